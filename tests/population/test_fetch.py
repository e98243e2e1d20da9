"""A population fetched from an archive: whole and checked, or not at all."""

import bz2
import gzip
import hashlib
import http.server
import io
import logging
import lzma
import os
import random
import sys
import tarfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from chorus.population import fetch as fetching
from chorus.population import manifest
from chorus.population.command import population as command
from chorus.population.errors import ChorusError
from chorus.population.fetch import AUTHORIZATION, fetch


class Shelf:
    """A web server with one file, which may want to be told a secret."""

    def __init__(self) -> None:
        self.body = b""
        self.secret: str | None = None
        self.redirects_to: str | None = None
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
            if shelf.redirects_to is not None and not self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", shelf.redirects_to)
                self.end_headers()
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
        (_escaping, "not a complete tar archive"),
        (lambda directory: pack(directory)[:200_000], "not a complete tar archive"),
        (lambda directory: b"<html>no such thing</html>", "not a complete tar archive"),
        (lambda directory: pack(directory / "members" / "t0-c00"), "contains 0 populations"),
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


def _link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def _file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _escaping_by_long_paths(up: int) -> bytes:
    """CVE-2025-4517: `os.path.realpath` gives up on a path that grows too long, and takes the rest of it as it stands.

    The last file is written `up` directories above the place that is unpacked into.
    """
    buffer, folder = io.BytesIO(), "d" * 247
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        path = ""
        for step in "abcdefghijklmnop":
            entry = tarfile.TarInfo(os.path.join(path, folder))  # noqa: PTH118
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
            archive.addfile(_link(os.path.join(path, step), folder))  # noqa: PTH118
            path = os.path.join(path, folder)  # noqa: PTH118
        through = os.path.join("/".join("abcdefghijklmnop"), "l" * 254)  # noqa: PTH118
        archive.addfile(_link(through, "../" * 16))
        archive.addfile(_link("escape", through + "/" + "../" * up))
        archive.addfile(_link("hard", "escape/escaped", tarfile.LNKTYPE))
        _file(archive, "hard", b"overwritten")
    return buffer.getvalue()


def _with_entry(directory: Path, entry: tarfile.TarInfo, content: bytes = b"") -> bytes:
    """The archive of a sound population, with one more entry."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
        archive.add(directory, arcname=".")
    return buffer.getvalue()


@pytest.mark.parametrize("only_manifest", [False, True])
def test_a_tar_that_leads_the_data_filter_outside_writes_nothing_there(
    shelf: Shelf, tmp_path: Path, only_manifest: bool
) -> None:
    victim = tmp_path / "escaped"
    victim.write_text("precious")
    for up in (2, 3, 1):
        shelf.body = _escaping_by_long_paths(up)
        for sha256, says in ((shelf.sha256, "neither a plain file nor a folder"), ("0" * 64, "expected 0000")):
            with pytest.raises(ChorusError) as refusal:
                fetch(shelf.url, sha256=sha256, out=tmp_path / "out", only_manifest=only_manifest)
            assert victim.read_text() == "precious"
            assert says in str(refusal.value)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["escaped", "out"]
            assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (_link("link", "population.json"), "neither a plain file nor a folder"),
        (_link("link", "/etc/passwd"), "neither a plain file nor a folder"),
        (_link("link", "population.json", tarfile.LNKTYPE), "neither a plain file nor a folder"),
        (_link("device", "", tarfile.CHRTYPE), "neither a plain file nor a folder"),
        (_link("pipe", "", tarfile.FIFOTYPE), "neither a plain file nor a folder"),
        (tarfile.TarInfo("/absolute"), "outside the archive"),
        (tarfile.TarInfo("members/../../up"), "outside the archive"),
        (tarfile.TarInfo("a/" * 40 + "b"), "too deep"),
        (tarfile.TarInfo("a/" * 1500 + "b"), "too deep"),
        (tarfile.TarInfo("n" * 300), "cannot be written"),
        (tarfile.TarInfo("population.json/x"), "cannot be written"),
        (tarfile.TarInfo(".incoming"), "left behind by a killed fetch"),
        (tarfile.TarInfo("./.incoming/unpacked"), "left behind by a killed fetch"),
        (tarfile.TarInfo("tiny/population.json"), "contains 2 populations"),
    ],
)
def test_an_archive_holds_plain_files_and_folders_inside_it(
    shelf: Shelf, tiny_population: Path, tmp_path: Path, entry: tarfile.TarInfo, says: str
) -> None:
    shelf.body = _with_entry(tiny_population, entry)
    with pytest.raises(ChorusError, match=says) as refusal:
        fetch(shelf.url, sha256=shelf.sha256, out=tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": ' * 100_000, "nested too deep"),
        (b"\xff\xfe{\x00", "not UTF-8"),
        (b'{"schema_version": 1, "name": "' + b"9" * 100, "is not JSON"),
        (b'{"schema_version": ' + b"9" * 5_000 + b"}", "is not JSON"),
        (b'{"schema_version": 1, "\\ud800": 1}', "violates the schema"),
        (None, "contains 0 populations"),
    ],
)
@pytest.mark.parametrize("only_manifest", [False, True])
def test_a_manifest_that_is_none_is_refused_in_a_sentence(
    shelf: Shelf, tmp_path: Path, content: bytes | None, says: str, only_manifest: bool
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        if content is None:
            archive.addfile(_link("population.json", "", tarfile.DIRTYPE))
        else:
            _file(archive, "population.json", content)
    shelf.body = buffer.getvalue()
    arguments = ["fetch", shelf.url, "--sha256", shelf.sha256, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(command, [*arguments, *["--only-manifest"] * only_manifest])
    assert isinstance(result.exception, ChorusError), result.output
    assert says in str(result.exception)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_what_unpacks_to_far_more_than_it_weighs_stops_at_the_limit(
    shelf: Shelf, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        _file(archive, "zeros", bytes(20_000_000))
    shelf.body = buffer.getvalue()
    written = 0
    copy = fetching._copy

    def counting(source: object, size: int, target: io.BufferedWriter) -> None:
        nonlocal written
        try:
            copy(source, size, target)  # type: ignore[arg-type]
        finally:
            written += target.tell()

    monkeypatch.setattr(fetching, "_copy", counting)
    with pytest.raises(ChorusError, match="expected 0000"):
        fetch(shelf.url, sha256="0" * 64, out=tmp_path)
    assert written == 0  # the digest comes first
    with pytest.raises(ChorusError, match="unpacks to more than 3,000,000 bytes"):
        fetch(shelf.url, sha256=shelf.sha256, out=tmp_path, max_bytes=3_000_000)
    assert written <= 3_000_000
    with pytest.raises(ChorusError, match="has more than 100 bytes"):
        fetch(shelf.url, sha256="0" * 64, out=tmp_path, max_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_a_header_as_large_as_the_memory_is_not_read(shelf: Shelf, tmp_path: Path) -> None:
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    shelf.body = gzip.compress(entry.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    with pytest.raises(ChorusError, match="a header of"):
        fetch(shelf.url, sha256=shelf.sha256, out=tmp_path)
    entry.type, entry.size = tarfile.REGTYPE, -512  # CVE-2025-8194: an entry that ends before it begins, for ever
    shelf.body = entry.tobuf(tarfile.GNU_FORMAT) + bytes(10_000)
    with pytest.raises(ChorusError, match="not a complete tar archive"):
        fetch(shelf.url, sha256=shelf.sha256, out=tmp_path)


def test_damage_anywhere_in_an_archive_ends_in_a_sentence(tiny_population: Path, tmp_path: Path) -> None:
    chance = random.Random(7)
    small = io.BytesIO()
    with tarfile.open(fileobj=small, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(tiny_population / "population.json", "ä" * 60 + "/population.json")
        archive.add(tiny_population / "config.json", "x/" * 20 + "config.json")
    packed = (compress(small.getvalue()) for compress in (bytes, gzip.compress, bz2.compress, lzma.compress))
    for original in (*packed, b"\xfd7zXZ\x00", b"BZh9", b"\x1f\x8b", b""):
        for attempt in range(100):
            body = bytearray(original)
            for _ in range(chance.randint(1, 8) if body else 0):
                body[chance.randrange(min(len(body), 4_000))] = chance.randrange(256)
            stream = io.BytesIO(bytes(body[: chance.randint(len(body) // 2, len(body))]))
            with suppress(ChorusError):
                fetching._unpack(stream, tmp_path, "http://host/x", 1_000_000, only_manifest=bool(attempt % 2))


@pytest.mark.parametrize(
    "url",
    [
        "population.tar", "/srv/population.tar", "file:///etc/passwd", "ftp://host/population.tar", "data:,x", "http://", "http:///x",
        "http://[::1/x", "http://host:99999/x", "http://host:port/x", "http://host/a b", "http://host/\r\nX: y", "",
        "http://me:hidden@host/x",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_in_a_sentence_without_its_secrets(url: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        command, ["fetch", f"{url}?hidden=hidden", "--sha256", "0" * 64, "--out", str(tmp_path / "out")]
    )
    assert isinstance(result.exception, ChorusError), result.output
    assert "address" in str(result.exception)
    assert "hidden" not in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "http://u:hidden@h/"]
)
def test_redirects_lead_to_the_web_only(shelf: Shelf, tmp_path: Path, target: str) -> None:
    shelf.redirects_to = target
    with pytest.raises(ChorusError, match=r"address|not allowed") as refusal:
        fetch(shelf.url, sha256="0" * 64, out=tmp_path)
    assert "hidden" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_redirects_are_followed_but_not_from_https_to_http(shelf: Shelf, tiny_population: Path, tmp_path: Path) -> None:
    shelf.body, shelf.redirects_to = pack(tiny_population), "/moved/population.tar"
    fetch(shelf.url, sha256=shelf.sha256, out=tmp_path)
    request = urllib.request.Request("https://host/population.tar?signature=secret")
    redirects = fetching._Redirects()
    with pytest.raises(ChorusError, match=r"redirects to http://host/x, from https to http"):
        redirects.redirect_request(request, io.BytesIO(), 302, "Found", None, "http://host/x?y")  # type: ignore[arg-type]
    onwards = redirects.redirect_request(request, io.BytesIO(), 302, "Found", {}, "https://other/x")  # type: ignore[arg-type]
    assert onwards is not None
    assert onwards.full_url == "https://other/x"


def test_a_digest_that_is_none_is_refused_before_anything_is_fetched(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(ChorusError, match="64 hexadecimal digits"):
        fetch(shelf.url, sha256="abc", out=tmp_path)
    assert shelf.num_asked == 0


def test_an_out_that_is_a_file_or_holds_links_and_files_in_the_way(
    shelf: Shelf, tiny_population: Path, tmp_path: Path
) -> None:
    shelf.body = pack(tiny_population)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ChorusError, match="cannot be written"):
        fetch(shelf.url, sha256=shelf.sha256, out=tmp_path / "file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("precious")
    out = tmp_path / "out"
    (out / "config.json").mkdir(parents=True)
    (out / "splits").write_text("a file")
    (out / "members").symlink_to(tmp_path / "elsewhere")
    (out / ".archive-sha256").write_bytes(b"\xff")
    population = fetch(shelf.url, sha256=shelf.sha256, out=out)
    manifest.verify(population, out)
    assert (tmp_path / "elsewhere" / "kept").read_text() == "precious"


def test_two_fetches_at_once_take_turns(shelf: Shelf, tiny_population: Path, tmp_path: Path) -> None:
    shelf.body = pack(tiny_population, mode="w:gz")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch(shelf.url, sha256=shelf.sha256, out=tmp_path / "out"), range(4)))
    assert found == [manifest.load(tiny_population)] * 4
    assert shelf.num_asked == 1
    assert not list((tmp_path / "out").glob(".incoming*"))


def test_a_fetch_that_breaks_off_while_it_moves_files_is_done_again(
    shelf: Shelf, tiny_population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.body = first = pack(tiny_population)
    fetch(shelf.url, sha256=shelf.sha256, out=tmp_path)
    shelf.body = pack(tiny_population, under="tiny")
    put, moved = fetching._move, []

    def killed(path: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(path)
        put(path, target)

    monkeypatch.setattr(fetching, "_move", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch(shelf.url, sha256=shelf.sha256, out=tmp_path)
    monkeypatch.undo()
    shelf.body = first  # what is half of each is taken for neither
    manifest.verify(fetch(shelf.url, sha256=shelf.sha256, out=tmp_path), tmp_path)
    assert shelf.num_asked == 3


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((3, 11, 7), "3.11.13"),
        ((3, 12, 10), "3.12.11"),
        ((3, 13, 0), "3.13.4"),
        ((3, 11, 13), None),
        ((3, 14, 0), None),
    ],
)
def test_an_old_python_is_named_with_the_release_that_is_safe(
    version: tuple[int, int, int],
    safe: str | None,
    shelf: Shelf,
    tiny_population: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Version(tuple[int, ...]):
        micro = version[2]

    monkeypatch.setattr(sys, "version_info", Version((*version, "final", 0)))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        fetching._warn_of_old_python()
    monkeypatch.undo()
    assert [safe in record.getMessage() for record in caplog.records] == ([] if safe is None else [True])
