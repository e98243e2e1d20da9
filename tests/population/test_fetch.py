"""A population fetched from an archive: whole and checked, or not at all."""

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from chorus.population import manifest
from chorus.population.command import population as command
from chorus.population.errors import ChorusError
from chorus.population.fetch import AUTHORIZATION, fetch


class Shelf:
    """A web server with one file, which may want to be told a secret."""

    def __init__(self) -> None:
        self.body = b""
        self.secret: str | None = None
        self.num_asked = 0
        self.url = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    with serving_shelf() as made:
        yield made


@contextmanager
def serving_shelf() -> Iterator[Shelf]:
    shelf = Shelf()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shelf.num_asked += 1
            if shelf.secret is not None and self.headers["Authorization"] != shelf.secret:
                self.send_error(403)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(shelf.body)

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    shelf.url = f"http://127.0.0.1:{server.server_port}/population.tar"
    try:
        yield shelf
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def pack(directory: Path, *, under: str = ".", mode: str = "w:") -> bytes:
    """The archive that `tar -C DIR -cf - .` makes, or that of the directory as seen from above."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        archive.add(directory, arcname=under)
    return buffer.getvalue()


@pytest.mark.parametrize(("under", "mode"), [(".", "w:"), ("tiny", "w:gz")])
def test_a_population_arrives_whole_and_is_not_fetched_twice(
    shelf: Shelf, tiny_population: Path, tmp_path: Path, under: str, mode: str
) -> None:
    shelf.body = pack(tiny_population, under=under, mode=mode)
    for _ in range(2):
        found = fetch(shelf.url, sha256=shelf.sha256.upper(), out=tmp_path)
        assert found == manifest.load(tiny_population)
    manifest.verify(found, tmp_path)
    assert shelf.num_asked == 1
    assert not (tmp_path / ".incoming").exists()


def test_a_new_archive_takes_the_place_of_the_old(shelf: Shelf, tiny_population: Path, tmp_path: Path) -> None:
    shelf.body = pack(tiny_population)
    fetch(shelf.url, sha256=shelf.sha256, out=tmp_path)
    newer = manifest.load(tiny_population).model_copy(update={"prior_version": 7})
    manifest.save(newer, tmp_path / "members")  # a second copy of the manifest, with which to make another archive
    (tmp_path / "members" / manifest.MANIFEST).replace(tmp_path / manifest.MANIFEST)
    shelf.body = pack(tmp_path)
    assert fetch(shelf.url, sha256=shelf.sha256, out=tmp_path).prior_version == 7
    assert shelf.num_asked == 2


def test_a_gateway_needs_the_manifest_only(shelf: Shelf, tiny_population: Path, tmp_path: Path) -> None:
    shelf.body = pack(tiny_population)
    arguments = ["fetch", shelf.url, "--sha256", shelf.sha256, "--out", str(tmp_path), "--only-manifest"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [".archive-sha256", manifest.MANIFEST]


def test_a_server_that_wants_a_secret_gets_it(
    shelf: Shelf, tiny_population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.body, shelf.secret = pack(tiny_population), "Bearer of-news"
    with pytest.raises(ChorusError, match="403"):
        fetch(shelf.url, sha256=shelf.sha256, out=tmp_path)
    monkeypatch.setenv(AUTHORIZATION, "Bearer of-news")
    fetch(shelf.url, sha256=shelf.sha256, out=tmp_path)


def _escaping(directory: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(directory / manifest.MANIFEST, arcname="../escaped")
    return buffer.getvalue()


def _damaged(directory: Path) -> bytes:
    body = bytearray(pack(directory))
    at = body.rindex((directory / "members/t0-c03/model.safetensors").read_bytes()[-64:])
    body[at] ^= 1
    return bytes(body)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_escaping, "not a whole tar archive"),
        (lambda directory: pack(directory)[:200_000], "not a whole tar archive"),
        (lambda directory: b"<html>no such thing</html>", "not a whole tar archive"),
        (lambda directory: pack(directory / "members" / "t0-c00"), "holds 0 populations"),
        (_damaged, "sha256"),
    ],
)
def test_what_is_not_sound_leaves_nothing_behind(
    shelf: Shelf, tiny_population: Path, tmp_path: Path, make: Callable[[Path], bytes], says: str
) -> None:
    shelf.body = make(tiny_population)
    out = tmp_path / "out"
    with pytest.raises(ChorusError, match=says):
        fetch(f"{shelf.url}?signature=secret", sha256=shelf.sha256, out=out)
    assert list(out.iterdir()) == []
    assert not (tmp_path / "escaped").exists()


def test_another_digest_is_refused_without_telling_secrets(shelf: Shelf, tiny_population: Path, tmp_path: Path) -> None:
    shelf.body = pack(tiny_population)
    with pytest.raises(ChorusError, match=shelf.sha256) as refusal:
        fetch(f"{shelf.url}?signature=secret", sha256="0" * 64, out=tmp_path)
    assert "secret" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
