"""Downloads a population from an archive and verifies it, for machines that start empty, such as containers.

The archive is a tar file of one population directory, compressed or not. It is unpacked after its digest was verified, and
installed after every digest in its manifest was. Our own code unpacks plain files and folders only, because Python's extraction
filters could be made to write outside the target (CVE-2025-4517) before 3.11.13, 3.12.11 and 3.13.4.
"""

import bz2
import gzip
import hashlib
import logging
import lzma
import os
import re
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast
from urllib.parse import urlsplit

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.files import locked
from chorus.population.manifest import MANIFEST, Population

AUTHORIZATION = "CHORUS_FETCH_AUTHORIZATION"
"""Environment variable with the value of the Authorization header, if the server needs one."""
MAX_BYTES = 100_000_000_000

_INCOMING = ".incoming"
_LOCK = ".incoming.lock"
_DIGEST_FILE = ".archive-sha256"
_CHUNK = 1 << 20
_MAX_MANIFEST = 64 << 20
_MAX_ENTRIES = 100_000
_MAX_DEPTH = 32
_MAGIC: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_TARFILE_BUGS = (ValueError, IndexError, KeyError, TypeError, OverflowError)
"""What tarfile raises besides TarError for some malformed archives."""
_SAFE_PATCH = {(3, 11): 13, (3, 12): 11, (3, 13): 4}
"""The first patch releases of Python that fix CVE-2025-4517; 3.14 never had it."""

logger = logging.getLogger(__name__)


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


def fetch(url: str, *, sha256: str, out: Path, only_manifest: bool = False, max_bytes: int = MAX_BYTES) -> Population:
    """Install the population from the archive at `url` in `out`, which may exist. If `out` has it already, nothing is fetched.

    With `only_manifest`, the whole archive is still read and verified, but only the manifest is kept. A gateway whose engines run
    on other machines needs no more. Neither the archive nor its unpacked contents may exceed `max_bytes`.

    Raises:
        ChorusError: the archive cannot be fetched, has a wrong digest, is not a tar file, is too large, or contains no valid
            population.
    """
    sha256 = sha256.lower()
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ChorusError(f"--sha256 {sha256!r} is not a SHA-256: expected 64 hexadecimal digits.")
    _check_url(url)
    _warn_of_old_python()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / _LOCK):
            return _fetch(url, sha256, out, only_manifest, max_bytes)
    except OSError as error:
        raise ChorusError(f"{error.filename or out} cannot be written ({error.strerror or error}).") from None


def _fetch(url: str, sha256: str, out: Path, only_manifest: bool, max_bytes: int) -> Population:
    digest_file = out / _DIGEST_FILE
    if digest_file.is_file() and digest_file.read_bytes() == sha256.encode() and (out / MANIFEST).is_file():
        return manifest.load(out)
    incoming = out / _INCOMING
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        unpacked = incoming / "unpacked"
        unpacked.mkdir(parents=True)
        if only_manifest:
            _download_manifest(url, sha256, unpacked, max_bytes)
        else:
            _download(url, sha256, incoming / "archive", unpacked, max_bytes)
        root = _population_root(unpacked, url)
        population = manifest.load(root)
        if not only_manifest:
            manifest.verify(population, root)
        digest_file.unlink(missing_ok=True)  # `out` matches no archive until its last file is in place
        for path in sorted(root.iterdir(), key=lambda path: path.name == MANIFEST):
            _move(path, out / path.name)
        digest_file.write_text(sha256)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return population


def _warn_of_old_python() -> None:
    series = sys.version_info[:2]
    if (safe := _SAFE_PATCH.get(series, 0)) > sys.version_info.micro:
        logger.warning(
            "Python %d.%d.%d has CVE-2025-4517: tarfile may write outside the target directory. This command refuses links and is "
            "safe; for other programs use %d.%d.%d or later.",
            *sys.version_info[:3], *series, safe,
        )  # fmt: skip


def _download(url: str, sha256: str, archive: Path, unpacked: Path, max_bytes: int) -> None:
    """Download the archive, verify its digest, and unpack it."""
    with _open(url) as answer, archive.open("wb") as file:
        stream = _HashingReader(answer, url, max_bytes)
        while data := stream.read(_CHUNK):
            file.write(data)
    _check_digest(stream, sha256, url)
    with archive.open("rb") as file:
        _unpack(cast(_Reader, file), unpacked, url, max_bytes, only_manifest=False)


def _download_manifest(url: str, sha256: str, unpacked: Path, max_bytes: int) -> None:
    """Unpack only the manifest while the archive streams through: a gateway may have no room for the weights."""
    problem: ChorusError | None = None
    with _open(url) as answer:
        stream = _HashingReader(answer, url, max_bytes)
        try:
            _unpack(stream, unpacked, url, max_bytes, only_manifest=True)
        except ChorusError as error:
            problem = error  # reported unless the digest is wrong, which matters more
        while stream.read(_CHUNK):
            pass
    _check_digest(stream, sha256, url)
    if problem is not None:
        raise problem


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to valid http and https addresses, but never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        try:
            _check_url(newurl)
            if req.type == "https" and urlsplit(newurl).scheme != "https":
                raise ChorusError(
                    f"{_redacted(req.full_url)} redirects to {_redacted(newurl)}, from https to http. "
                    "Use an address that stays on https."
                )
            return super().redirect_request(req, fp, code, msg, headers, newurl)
        except ChorusError:
            fp.close()
            raise


@contextmanager
def _open(url: str) -> Iterator[IO[bytes]]:
    request = urllib.request.Request(url)
    if authorization := os.environ.get(AUTHORIZATION):
        request.add_unredirected_header("Authorization", authorization)  # do not send it to other hosts on a redirect
    with _network_errors(url):
        answer = urllib.request.build_opener(_Redirects).open(request, timeout=60)
    with answer:
        yield answer


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Turn network errors into ChorusError. Disk errors must not be raised inside this block."""
    try:
        yield
    except (HTTPException, OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise ChorusError(f"cannot fetch the archive at {_redacted(url)}: {error}.") from None


class _HashingReader:
    """Reads from the network, limits the number of bytes, and computes their digest."""

    def __init__(self, stream: IO[bytes], url: str, max_bytes: int) -> None:
        self._stream, self._url, self._max_bytes = stream, url, max_bytes
        self._num_bytes = 0
        self.digest = hashlib.sha256()

    def read(self, size: int = _CHUNK, /) -> bytes:
        """Like `read` of a binary file."""
        with _network_errors(self._url):
            data = self._stream.read(size if size >= 0 else _CHUNK)
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise _too_large("has", self._url, self._max_bytes)
        self.digest.update(data)
        return data


def _check_digest(stream: _HashingReader, sha256: str, url: str) -> None:
    if (found := stream.digest.hexdigest()) != sha256:
        raise ChorusError(f"the archive at {_redacted(url)} has sha256 {found}, expected {sha256}. Nothing was kept.")


class _TarStream:
    """The decompressed archive, as tarfile reads it: forward only, in chunks, up to `max_bytes` decompressed bytes."""

    def __init__(self, stream: _Reader, url: str, max_bytes: int) -> None:
        head = stream.read(6)
        rest = _Prefixed(head, stream)
        opener = next((opener for magic, opener in _MAGIC.items() if head.startswith(magic)), None)
        self._stream: _Reader = rest if opener is None else opener(rest)
        self._url, self._max_bytes = url, max_bytes
        self._position = 0

    def read(self, size: int = -1, /) -> bytes:
        """Read at most `_CHUNK` bytes. Our archives have no larger headers."""
        if not 0 <= size <= _CHUNK:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        parts = []
        try:
            while size and (data := self._stream.read(size)):
                parts.append(data)
                size -= len(data)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise tarfile.ReadError(str(error)) from None
        found = b"".join(parts)
        self._position += len(found)
        if self._position > self._max_bytes:
            raise _too_large("unpacks to", self._url, self._max_bytes)
        return found

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, /) -> int:
        """Skip forward to `position`."""
        if position < self._position:
            raise tarfile.ReadError("an entry that ends before it starts")
        while self._position < position and self.read(min(_CHUNK, position - self._position)):
            pass
        return self._position


class _Prefixed:
    """A stream whose first bytes were already read as `head`."""

    def __init__(self, head: bytes, rest: _Reader) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int = _CHUNK, /) -> bytes:
        found, self._head = self._head[:size], self._head[size:]
        return found or self._rest.read(size)


def _unpack(stream: _Reader, into: Path, url: str, max_bytes: int, *, only_manifest: bool) -> None:
    """Write the archive's files below `into`; with `only_manifest`, only the manifests in its top two levels.

    Raises:
        ChorusError: it is not a tar file, is truncated or too large, or contains anything but plain files and folders.
    """
    try:
        tar_stream = cast(IO[bytes], _TarStream(stream, url, max_bytes))
        with tarfile.open(fileobj=tar_stream, mode="r:") as archive:
            for number, entry in enumerate(archive):
                path = _checked_path(entry, number, url)
                if only_manifest and not (path.name == MANIFEST and len(path.parts) <= 2 and entry.isreg()):
                    continue
                if only_manifest and entry.size > _MAX_MANIFEST:
                    raise ChorusError(f"{MANIFEST} in the archive at {_redacted(url)} has {entry.size:,} bytes.")
                if entry.isdir():
                    (into / path).mkdir(parents=True, exist_ok=True)
                    continue
                (into / path).parent.mkdir(parents=True, exist_ok=True)
                with (into / path).open("wb") as file:
                    _copy(tar_stream, entry.size, file)
    except (tarfile.TarError, *_TARFILE_BUGS) as error:
        raise _invalid_archive(url, str(error)) from None


def _checked_path(entry: tarfile.TarInfo, number: int, url: str) -> PurePosixPath:
    """The path of an entry, relative to the target directory."""
    path = PurePosixPath(entry.name)
    if not (entry.isreg() or entry.isdir()) or entry.issparse():
        raise _invalid_archive(
            url, f"{entry.name!r} is neither a plain file nor a folder: pack without links and sparse files"
        )
    if path.is_absolute() or ".." in path.parts or "\0" in entry.name or len(path.parts) > _MAX_DEPTH:
        raise _invalid_archive(url, f"{entry.name!r:.200} points outside the archive, or is nested too deeply")
    if {_INCOMING, _LOCK}.intersection(path.parts[:2]):
        raise _invalid_archive(url, f"{entry.name!r} was left behind by a killed fetch; remove it and pack again")
    if number >= _MAX_ENTRIES:
        raise _invalid_archive(url, f"it contains more than {_MAX_ENTRIES:,} files")
    return path


def _copy(source: IO[bytes], size: int, target: IO[bytes]) -> None:
    while size:
        if not (data := source.read(min(_CHUNK, size))):
            raise tarfile.ReadError("unexpected end of data")
        target.write(data)
        size -= len(data)


def _population_root(incoming: Path, url: str) -> Path:
    """The directory with the manifest: the top of the archive, or a directory there."""
    found = [path.parent for path in (incoming / MANIFEST, *incoming.glob(f"*/{MANIFEST}")) if path.is_file()]
    if len(found) != 1:
        raise ChorusError(
            f"the archive at {_redacted(url)} contains {len(found)} populations at its top, expected one. "
            "Pack it with `tar -C DIR -cf population.tar .`"
        )
    return found[0]


def _move(path: Path, target: Path) -> None:
    """Move `path` to `target`, replacing what is there."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    elif path.is_dir():
        target.unlink(missing_ok=True)
    path.replace(target)


def _invalid_archive(url: str, reason: str) -> ChorusError:
    return ChorusError(f"the file at {_redacted(url)} is not a complete tar archive of a population: {reason}.")


def _too_large(verb: str, url: str, max_bytes: int) -> ChorusError:
    return ChorusError(
        f"the archive at {_redacted(url)} {verb} more than {max_bytes:,} bytes. If that is expected, raise --max-bytes."
    )


def _check_url(url: str) -> None:
    """Refuse anything but a plain http or https address, before its secrets could reach another library's error message."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or re.search(r"[\x00-\x20\x7f]", url):
        raise ChorusError(f"{_redacted(url)!r} is not a valid address: expected http://HOST/PATH or https://HOST/PATH.")
    if parts.username is not None:
        raise ChorusError(
            f"the address {_redacted(url)} contains a user name: set an Authorization header in {AUTHORIZATION} instead."
        )


def _redacted(url: str) -> str:
    """The address without possible secrets: the query of a signed address, and the password."""
    start, _, _ = url.partition("?")
    scheme, slashes, rest = start.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}".partition("#")[0]
