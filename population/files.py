"""Files that are either the old version or the new one, never half of each; their digests; and locks between processes."""

import fcntl
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chorus.population.errors import ChorusError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it over `path` when the block ends without an exception.

    The data and the directory entry are flushed to disk, so that a power cut leaves the old file or the new one.

    Raises:
        OSError: naming `path`, which a failed write by itself does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, name):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_array(path: Path, array: "NDArray[Any]") -> None:
    """Write `array` to `path` atomically, in NumPy's format.

    Raises:
        OSError: with the system's reason. NumPy by itself reports a full disk as "so many requested and so many written".
    """
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock at `path` against all other processes. The file exists only while somebody holds it or was killed.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    while True:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(path, file.fileno()):  # the holder before removed it: whoever comes next locks another file
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def read_json(path: Path) -> Any:
    """What a JSON file holds. Nothing in it ends in a traceback: a stranger may have written it.

    Raises:
        FileNotFoundError, NotADirectoryError: it does not exist; what that means is for the caller.
        ChorusError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise ChorusError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}"
    except RecursionError:
        reason = "nested too deep"
    except ValueError as error:
        reason = str(error)
    raise ChorusError(f"{path} is not JSON ({reason}). Restore it from a backup or make it again.")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
