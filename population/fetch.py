"""Brings a population from an archive elsewhere to this machine, checked: for machines that begin empty, such as containers.

The archive is a tar file, compressed or not, of one population directory. It is unpacked only once its digest agrees, plain files
and folders alone, by code of our own: Python's extraction filters could be led outside (CVE-2025-4517) before 3.11.13, 3.12.11 and
3.13.4. Nothing is in place before every digest of the manifest agrees as well.
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
"""Environment variable with the value of the request's Authorization header, if the archive's server wants one."""
MAX_BYTES = 100_000_000_000

_INCOMING = ".incoming"
_LOCK = ".incoming.lock"
_SOURCE = ".archive-sha256"
_CHUNK = 1 << 20
_MAX_MANIFEST = 64 << 20
_MAX_ENTRIES = 100_000
_MAX_DEPTH = 32
_MAGIC: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_SAFE_PATCH = {(3, 11): 13, (3, 12): 11, (3, 13): 4}
"""Patch releases of Python with the mend of CVE-2025-4517; 3.14 was never without."""

logger = logging.getLogger(__name__)


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


def fetch(url: str, *, sha256: str, out: Path, only_manifest: bool = False, max_bytes: int = MAX_BYTES) -> Population:
    """Put the population in the archive at `url` into `out`, which may exist; what it holds already is not fetched again.

    With `only_manifest` the whole archive is read and checked, and the manifest kept: all that a gateway before engines elsewhere
    needs. Neither the archive nor what it unpacks to may be larger than `max_bytes`.

    Raises:
        ChorusError: the archive cannot be had, has another digest, is no archive, is too large, or holds no sound population.
    """
    sha256 = sha256.lower()
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ChorusError(f"--sha256 {sha256!r} is not a SHA-256: 64 hexadecimal digits are expected.")
    _check_url(url)
    _warn_of_old_python()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / _LOCK):
            return _fetch(url, sha256, out, only_manifest, max_bytes)
    except OSError as error:
        raise ChorusError(f"{error.filename or out} cannot be written ({error.strerror or error}).") from None


def _fetch(url: str, sha256: str, out: Path, only_manifest: bool, max_bytes: int) -> Population:
    source = out / _SOURCE
    if source.is_file() and source.read_bytes() == sha256.encode() and (out / MANIFEST).is_file():
        return manifest.load(out)
    incoming = out / _INCOMING
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        unpacked = incoming / "unpacked"
        unpacked.mkdir(parents=True)
        if only_manifest:
            _receive_manifest(url, sha256, unpacked, max_bytes)
        else:
            _receive(url, sha256, incoming / "archive", unpacked, max_bytes)
        root = _root(unpacked, url)
        population = manifest.load(root)
        if not only_manifest:
            manifest.verify(population, root)
        source.unlink(missing_ok=True)  # until the last file is in place, `out` is the copy of no archive
        for path in sorted(root.iterdir(), key=lambda path: path.name == MANIFEST):
            _put(path, out / path.name)
        source.write_text(sha256)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return population


def _warn_of_old_python() -> None:
    series = sys.version_info[:2]
    if (safe := _SAFE_PATCH.get(series, 0)) > sys.version_info.micro:
        logger.warning(
            "Python %d.%d.%d has CVE-2025-4517: tarfile writes outside the directory that it unpacks into. This command takes no "
            "links and is safe; for other programs use %d.%d.%d or later.",
            *sys.version_info[:3], *series, safe,
        )  # fmt: skip


def _receive(url: str, sha256: str, archive: Path, unpacked: Path, max_bytes: int) -> None:
    """Unpack the archive, after its digest was seen to agree."""
    with _opened(url) as answer, archive.open("wb") as file:
        stream = _Hashing(answer, url, max_bytes)
        while data := stream.read(_CHUNK):
            file.write(data)
    _check_digest(stream, sha256, url)
    with archive.open("rb") as file:
        _unpack(cast(_Reader, file), unpacked, url, max_bytes, only_manifest=False)


def _receive_manifest(url: str, sha256: str, unpacked: Path, max_bytes: int) -> None:
    """Unpack the archive's manifest alone while the rest passes by: a gateway has no room for the weights."""
    problem: ChorusError | None = None
    with _opened(url) as answer:
        stream = _Hashing(answer, url, max_bytes)
        try:
            _unpack(stream, unpacked, url, max_bytes, only_manifest=True)
        except ChorusError as error:
            problem = error  # a wrong digest counts for more
        while stream.read(_CHUNK):
            pass
    _check_digest(stream, sha256, url)
    if problem is not None:
        raise problem


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to where the first address might have pointed, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        try:
            _check_url(newurl)
            if req.type == "https" and urlsplit(newurl).scheme != "https":
                raise ChorusError(
                    f"{_shown(req.full_url)} redirects to {_shown(newurl)}, from https to http. "
                    "Give an address that stays on https."
                )
            return super().redirect_request(req, fp, code, msg, headers, newurl)
        except ChorusError:
            fp.close()
            raise


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    request = urllib.request.Request(url)
    if authorization := os.environ.get(AUTHORIZATION):
        request.add_unredirected_header("Authorization", authorization)  # not to the next host
    with _naming(url):
        answer = urllib.request.build_opener(_Redirects).open(request, timeout=60)
    with answer:
        yield answer


@contextmanager
def _naming(url: str) -> Iterator[None]:
    """Turn what goes wrong on the way into a sentence, and not what goes wrong on the disk."""
    try:
        yield
    except (HTTPException, OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise ChorusError(f"the archive at {_shown(url)} cannot be fetched: {error}.") from None


class _Hashing:
    """Reads what comes over the network and takes its digest."""

    def __init__(self, stream: IO[bytes], url: str, max_bytes: int) -> None:
        self._stream, self._url, self._max_bytes = stream, url, max_bytes
        self._num_bytes = 0
        self.digest = hashlib.sha256()

    def read(self, size: int = _CHUNK, /) -> bytes:
        """As of any file."""
        with _naming(self._url):
            data = self._stream.read(size if size >= 0 else _CHUNK)
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise _too_large("is", self._url, self._max_bytes)
        self.digest.update(data)
        return data


def _check_digest(stream: _Hashing, sha256: str, url: str) -> None:
    if (found := stream.digest.hexdigest()) != sha256:
        raise ChorusError(
            f"the archive at {_shown(url)} has sha256 {found}, expected was {sha256}. Nothing of it was kept."
        )


class _Bounded:
    """What tarfile reads headers from: forwards, in pieces, up to a limit. Decompressed bytes count."""

    def __init__(self, stream: _Reader, url: str, max_bytes: int) -> None:
        head = stream.read(6)
        rest = _Joined(head, stream)
        opener = next((opener for magic, opener in _MAGIC.items() if head.startswith(magic)), None)
        self._stream: _Reader = rest if opener is None else opener(rest)
        self._url, self._max_bytes = url, max_bytes
        self._position = 0

    def read(self, size: int = -1, /) -> bytes:
        """At most `_CHUNK` bytes: a header that is larger is none of ours."""
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
        """Read on to `position`."""
        if position < self._position:
            raise tarfile.ReadError("an entry that begins before its end")
        while self._position < position and self.read(min(_CHUNK, position - self._position)):
            pass
        return self._position


class _Joined:
    """What was read of a stream, and then the rest of it."""

    def __init__(self, head: bytes, rest: _Reader) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int = _CHUNK, /) -> bytes:
        found, self._head = self._head[:size], self._head[size:]
        return found or self._rest.read(size)


def _unpack(stream: _Reader, into: Path, url: str, max_bytes: int, *, only_manifest: bool) -> None:
    """Write the archive's files to their places below `into`; with `only_manifest`, those of that name at its top.

    Raises:
        ChorusError: it is no archive, is cut short, is too large, or holds anything but plain files and folders.
    """
    try:
        bounded = cast(IO[bytes], _Bounded(stream, url, max_bytes))
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            for number, entry in enumerate(archive):
                path = _place(entry, number, url)
                if only_manifest and not (path.name == MANIFEST and len(path.parts) <= 2 and entry.isreg()):
                    continue
                if only_manifest and entry.size > _MAX_MANIFEST:
                    raise ChorusError(f"{MANIFEST} in the archive at {_shown(url)} has {entry.size:,} bytes.")
                if entry.isdir():
                    (into / path).mkdir(parents=True, exist_ok=True)
                    continue
                (into / path).parent.mkdir(parents=True, exist_ok=True)
                with (into / path).open("wb") as file:
                    _copy(bounded, entry.size, file)
    except (
        tarfile.TarError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
    ) as error:  # tarfile lets some through
        raise _no_archive(url, str(error)) from None


def _place(entry: tarfile.TarInfo, number: int, url: str) -> PurePosixPath:
    """Where an entry belongs, below the directory that is unpacked into."""
    path = PurePosixPath(entry.name)
    if not (entry.isreg() or entry.isdir()) or entry.issparse():
        raise _no_archive(url, f"{entry.name!r} is neither a plain file nor a folder: pack without links and holes")
    if path.is_absolute() or ".." in path.parts or "\0" in entry.name or len(path.parts) > _MAX_DEPTH:
        raise _no_archive(url, f"{entry.name!r:.200} leads out of it, or too deep")
    if {_INCOMING, _LOCK}.intersection(path.parts[:2]):
        raise _no_archive(url, f"{entry.name!r} is the rest of a fetch that was killed; remove it and pack again")
    if number >= _MAX_ENTRIES:
        raise _no_archive(url, f"it holds more than {_MAX_ENTRIES:,} files")
    return path


def _copy(source: IO[bytes], size: int, target: IO[bytes]) -> None:
    while size:
        if not (data := source.read(min(_CHUNK, size))):
            raise tarfile.ReadError("unexpected end of data")
        target.write(data)
        size -= len(data)


def _root(incoming: Path, url: str) -> Path:
    """The directory with the manifest: the archive's own top, or the only directory there."""
    found = [path.parent for path in (incoming / MANIFEST, *incoming.glob(f"*/{MANIFEST}")) if path.is_file()]
    if len(found) != 1:
        raise ChorusError(
            f"the archive at {_shown(url)} holds {len(found)} populations at its top, expected was one. "
            "Make it with `tar -C DIR -cf population.tar .`"
        )
    return found[0]


def _put(path: Path, target: Path) -> None:
    """Move `path` to `target`, in the place of what is there."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    elif path.is_dir():
        target.unlink(missing_ok=True)
    path.replace(target)


def _no_archive(url: str, reason: str) -> ChorusError:
    return ChorusError(f"what is at {_shown(url)} is not a whole tar archive of a population: {reason}.")


def _too_large(does: str, url: str, max_bytes: int) -> ChorusError:
    return ChorusError(
        f"the archive at {_shown(url)} {does} more than {max_bytes:,} bytes. Give more with --max-bytes if that is right."
    )


def _check_url(url: str) -> None:
    """Refuse what is not a plain address of the web, before any of its secrets can get into a message."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or re.search(r"[\x00-\x20\x7f]", url):
        raise ChorusError(
            f"{_shown(url)!r} is not the address of an archive: http://HOST/PATH or https://HOST/PATH is expected."
        )
    if parts.username is not None:
        raise ChorusError(
            f"the address {_shown(url)} holds a user's name: put an Authorization header into {AUTHORIZATION}."
        )


def _shown(url: str) -> str:
    """Without what may be a secret: the query of a signed address, a password."""
    start, _, _ = url.partition("?")
    scheme, slashes, rest = start.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}".partition("#")[0]
