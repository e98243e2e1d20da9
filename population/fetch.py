"""Brings a population from an archive elsewhere to this machine, checked: for machines that begin empty, such as containers.

The archive is a tar file, compressed or not, of one population directory. Its digest is taken while it streams, so no second
copy is kept; nothing is in place before the digest and, of what was kept, every digest of the manifest agree.
"""

import hashlib
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO, cast
from urllib.parse import urlsplit

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.manifest import MANIFEST, Population

AUTHORIZATION = "CHORUS_FETCH_AUTHORIZATION"
"""Environment variable with the value of the request's Authorization header, if the archive's server wants one."""

_INCOMING = ".incoming"
_SOURCE = ".archive-sha256"
_CHUNK = 1 << 20


def fetch(url: str, *, sha256: str, out: Path, only_manifest: bool = False) -> Population:
    """Put the population in the archive at `url` into `out`, which may exist; what it holds already is not fetched again.

    With `only_manifest` the whole archive is read and checked, and the manifest kept: all that a gateway before engines elsewhere
    needs.

    Raises:
        ChorusError: the archive cannot be had, has another digest, is no archive, or holds no sound population.
    """
    sha256 = sha256.lower()
    source = out / _SOURCE
    if source.is_file() and source.read_text() == sha256 and (out / MANIFEST).is_file():
        return manifest.load(out)
    incoming = out / _INCOMING
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    try:
        found = _receive(url, incoming, only_manifest=only_manifest)
        if found != sha256:
            raise ChorusError(
                f"the archive at {_shown(url)} has sha256 {found}, expected was {sha256}. Nothing of it was kept."
            )
        root = _root(incoming, url)
        population = manifest.load(root)
        if not only_manifest:
            manifest.verify(population, root)
        for path in root.iterdir():
            target = out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        source.write_text(sha256)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return population


class _Hashing:
    """Reads a stream and takes its digest."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """As of any file."""
        data = self._stream.read(size)
        self.digest.update(data)
        return data


def _receive(url: str, incoming: Path, *, only_manifest: bool) -> str:
    """Unpack the stream into `incoming`; its digest."""
    request = urllib.request.Request(url)
    if authorization := os.environ.get(AUTHORIZATION):
        request.add_unredirected_header("Authorization", authorization)  # not to the next host
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            stream = _Hashing(answer)
            with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|*") as archive:
                for entry in archive:
                    if not only_manifest or Path(entry.name).name == MANIFEST:
                        archive.extract(entry, incoming, filter="data")
            while stream.read(_CHUNK):  # what follows the archive's end is part of the file, too
                pass
    except tarfile.TarError as error:
        raise ChorusError(f"what is at {_shown(url)} is not a whole tar archive of a population: {error}.") from None
    except (urllib.error.URLError, HTTPException, EOFError, OSError, ValueError) as error:
        raise ChorusError(f"the archive at {_shown(url)} cannot be fetched: {error}.") from None
    return stream.digest.hexdigest()


def _root(incoming: Path, url: str) -> Path:
    """The directory with the manifest: the archive's own top, or the only directory there."""
    found = [path.parent for path in (incoming / MANIFEST, *incoming.glob(f"*/{MANIFEST}")) if path.is_file()]
    if len(found) != 1:
        raise ChorusError(
            f"the archive at {_shown(url)} holds {len(found)} populations at its top, expected was one. "
            "Make it with `tar -C DIR -cf population.tar .`"
        )
    return found[0]


def _shown(url: str) -> str:
    """Without what may be a secret: the query of a signed address, a password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
