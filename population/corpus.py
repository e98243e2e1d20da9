"""Reads a corpus as documents, from a file, a folder, a dataset or Python's standard library, and splits it.

Splits keep documents whole, so two parts of one document never end up in different splits. Tokens are handled in `tokens`.
"""

import hashlib
import itertools
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chorus.population.errors import ChorusError
from chorus.population.notes import Notes
from chorus.population.rows import JSON, ROW_SUFFIXES, holds_rows, read_rows, row_text
from chorus.population.textfile import COMPRESSED_SUFFIXES, NotTextError, content_suffix, read_pieces

SPLITS = ("train", "fitness", "selection", "test")
STDLIB = "stdlib"

# Tests, generated tables and bundled applications, which are not typical prose or code.
_STDLIB_EXCLUDED = {
    "test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "pydoc_data", "ensurepip", "distutils",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
_TEXT_SUFFIXES = {"", ".txt", ".md", ".rst", ".tex", ".html", ".csv", ".tsv", ".org", ".text"}
_CODE_SUFFIXES = {
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".rb", ".sh",
    ".jl", ".r", ".scala", ".kt", ".swift", ".php", ".pl", ".lua", ".hs", ".ml", ".sql", ".json", ".yaml", ".toml",
}  # fmt: skip
_READ_SUFFIXES = _TEXT_SUFFIXES | _CODE_SUFFIXES | ROW_SUFFIXES
_FEW_FILES = 20  # a folder with fewer files has too few documents to split, so long files are cut into passages
_LONG_FILE_BYTES = 16_000  # longer files of such a folder are cut
_MAX_FILES_PER_NOTE = 5
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:.+)?")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A named text that is never split."""

    name: str
    text: str


def read_documents(source: str, *, split_on: str | None = None, text_field: str = "text") -> Iterator[Document]:
    """Yield the non-empty documents of a corpus, in the same order on every run; see `read_all_documents`."""
    notes, num_empty = Notes(), 0
    for document in read_all_documents(source, split_on=split_on, text_field=text_field, notes=notes):
        if document.text.strip():
            yield document
        else:
            num_empty += 1
    if num_empty:
        notes(f"{source}: skipped {num_empty} document{'s' * (num_empty > 1)} without text.")


def read_all_documents(
    source: str, *, split_on: str | None = None, text_field: str = "text", notes: Notes | None = None
) -> Iterator[Document]:
    """Yield all documents of a corpus, including empty ones, in the same order on every run.

    Args:
        source: one of: `stdlib` (the running Python's standard library); a text file; a file of rows (JSON lines, a `.json` array
            or Parquet), each row a document; a folder of such files; or the name of a Hugging Face dataset, `NAME` or
            `NAME:CONFIG`, whose train split is streamed. Files may be compressed.
        split_on: regular expression; every matching line of a text file starts a new document. Without it, a file is cut at
            `<|endoftext|>` if it contains any. Without that mark, a single file, or a long one (16 kB) in a folder with fewer than
            20, is cut at blank lines into passages of about 4,000 characters, because one document cannot be split; see
            `textfile.read_pieces`.
        text_field: the field of a row, or column of a dataset, with the text.
        notes: reports what was skipped, and cuts that the user may not expect.

    Raises:
        ChorusError: the source does not exist or is not UTF-8, or the dataset cannot be loaded.
    """
    path, notes = locate(source), notes or Notes()
    if source == STDLIB:
        documents = _read_stdlib()
    elif path.is_dir():
        documents = _read_folder(path, split_on, text_field, notes)
    elif path.is_file():
        documents = _read_file(path, path.name, split_on, text_field, passages=True, notes=notes)
        if content_suffix(path) == JSON and not holds_rows(path, text_field):
            raise ChorusError(
                f"{path} is neither an array of objects or strings nor one object per line. Extract the list of documents, "
                "for example with `jq -c '.data[]'`, and set the name of the text field with --text-field."
            )
    elif path.exists():
        raise ChorusError(
            f"corpus {source!r} is neither a file nor a folder. It is read several times, so write it to a file."
        )
    elif _looks_like_path(source):
        raise ChorusError(f"corpus {source!r} does not exist. Use a text file, a folder, a dataset name or `{STDLIB}`.")
    else:
        documents = _read_dataset(source, text_field, notes)
    return documents


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """The sizes of a document, without its text. Used to sample and split a corpus that does not fit in memory."""

    idx: int
    """Position in reading order."""
    num_bytes: int
    num_characters: int


def survey_documents(documents: Iterable[Document]) -> Iterator[Outline]:
    """Outlines of the distinct documents, in reading order. Memory: a few hundred bytes per document.

    Exact duplicates are dropped: copies in both the train split and a held-out split would make every held-out loss too low.
    """
    seen: set[bytes] = set()
    for idx, document in enumerate(documents):
        encoded = document.text.encode()
        digest = hashlib.sha256(encoded).digest()
        if digest not in seen:
            seen.add(digest)
            yield Outline(idx=idx, num_bytes=len(encoded), num_characters=len(document.text))


def sample_outlines(outlines: Iterable[Outline], *, max_bytes: int | None, seed: int) -> list[Outline]:
    """Outlines in a seeded random order, up to `max_bytes` of UTF-8; all of them if `max_bytes` is None.

    Documents of at most `max_bytes` / 40 come first: with a few long documents, each split would depend on one of them, and
    confidence intervals over documents would mean little. A document that would exceed the limit is skipped; later ones may fit.
    """
    shuffled = list(outlines)
    random.Random(seed).shuffle(shuffled)
    if max_bytes is None:
        return shuffled
    shuffled.sort(key=lambda outline: outline.num_bytes * 40 > max_bytes)  # a stable sort keeps the random order
    sampled, num_bytes = [], 0
    for outline in shuffled:
        if num_bytes + outline.num_bytes <= max_bytes:
            sampled.append(outline)
            num_bytes += outline.num_bytes
    return sampled


def split_outlines(outlines: list[Outline], fractions: dict[str, float]) -> dict[str, list[Outline]]:
    """Assign whole documents to splits whose sizes in characters approximate `fractions`.

    Documents are assigned in the given order (`sample_outlines` shuffles them), each to the split that is missing the largest part
    of its share, so that a few long documents do not starve a small split.

    Raises:
        ChorusError: a split with a positive fraction got no document.
    """
    if not outlines:
        raise ChorusError("the corpus is empty: no document contains text. Use a corpus of at least a few documents.")
    total = sum(outline.num_characters for outline in outlines)
    targets = {name: fraction * total for name, fraction in fractions.items() if fraction > 0}
    splits: dict[str, list[Outline]] = {name: [] for name in targets}
    filled = dict.fromkeys(targets, 0)
    for outline in outlines:
        name = max(targets, key=lambda split: (targets[split] - filled[split]) / targets[split])
        splits[name].append(outline)
        filled[name] += outline.num_characters
    if empty := [name for name, assigned in splits.items() if not assigned]:
        raise ChorusError(
            f"the corpus is too small for its splits: {len(outlines)} documents leave {', '.join(empty)} empty. "
            f"It needs at least {len(targets)} documents, and better some dozens: add text, "
            "or cut it into more documents with --split-on."
        )
    return splits


def sample_documents(documents: Iterable[Document], *, max_bytes: int | None, seed: int) -> list[Document]:
    """A sample of the distinct documents of a corpus that fits in memory; see `survey_documents` and `sample_outlines`."""
    loaded = list(documents)
    return [
        loaded[outline.idx] for outline in sample_outlines(survey_documents(loaded), max_bytes=max_bytes, seed=seed)
    ]


def split_documents(documents: list[Document], fractions: dict[str, float]) -> dict[str, list[Document]]:
    """Assign documents to splits; see `split_outlines`."""
    outlines = [
        Outline(idx=idx, num_bytes=0, num_characters=len(document.text)) for idx, document in enumerate(documents)
    ]
    splits = split_outlines(outlines, fractions)
    return {name: [documents[outline.idx] for outline in assigned] for name, assigned in splits.items()}


def _looks_like_path(source: str) -> bool:
    """Whether a missing source must be a mistyped file or folder, since it cannot be a dataset name."""
    suffixes = (_READ_SUFFIXES | COMPRESSED_SUFFIXES) - {""}
    return source.lower().endswith(tuple(suffixes)) or source.startswith(".") or not _DATASET.fullmatch(source)


def _read_stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _STDLIB_EXCLUDED.intersection(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():  # an empty __init__.py is normal, so it gives no note
            yield Document(name=str(relative), text=text)


def locate(source: str) -> Path:
    """The path of a corpus, which need not exist: the corpus may be a dataset.

    Raises:
        ChorusError: the path cannot be accessed, or its name is not UTF-8, which the manifest cannot record.
    """
    if any("\ud800" <= character <= "\udfff" for character in source):
        raise ChorusError(f"the name of corpus {source!r} is not UTF-8. Rename it, or use its parent folder.")
    try:
        Path(source).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be a dataset
    except OSError as error:
        raise ChorusError(f"corpus {source[:200]!r} cannot be read: {error.strerror}.") from None
    return Path(source)


def walk(root: Path, notes: Notes) -> list[Path]:
    """All files below a folder except hidden ones, sorted. Links are followed, but never into a parent, nor twice into a folder."""
    files: list[Path] = []
    entered = {_identity(parent) for parent in root.resolve().parents}

    def skip(error: OSError) -> None:
        notes(f"skipped {error.filename}: {error.strerror}.")

    for here, folders, names in os.walk(root, followlinks=True, onerror=skip):
        if (identity := _identity(Path(here))) in entered:
            folders.clear()
            continue
        entered.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _kind(path: Path) -> str:
    return path.suffix.lower() if path.is_file() else "broken link or special file"


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _read_folder(root: Path, split_on: str | None, text_field: str, notes: Notes) -> Iterator[Document]:
    files = walk(root, notes)
    paths = [path for path in files if content_suffix(path) in _READ_SUFFIXES and path.is_file()]
    if other := Counter(_kind(path) for path in sorted(set(files).difference(paths))):
        kinds = ", ".join(f"{count} {kind}" for kind, count in other.most_common())
        notes(f"{root}: skipped files of other types: {kinds}.")
    if not paths:
        raise ChorusError(f"the corpus is empty: the folder {root} contains no text files.")
    skipped: list[str] = []
    for path in paths:
        name, num_given = str(path.relative_to(root)), 0
        cut = len(paths) == 1 or (len(paths) < _FEW_FILES and path.stat().st_size > _LONG_FILE_BYTES)
        try:
            for document in _read_file(path, name, split_on, text_field, passages=cut, notes=notes):
                yield document
                num_given += 1
        except ChorusError as error:
            # Skip files that are not text, and JSON without the text field, which may be data of a program. A truncated file of
            # rows is an error.
            if num_given or not (isinstance(error, NotTextError) or content_suffix(path) == JSON):
                raise
            skipped.append(str(error))
    if len(skipped) == len(paths):
        raise ChorusError(f"the folder {root} contains no readable text. {skipped[0]}")
    if skipped:
        num_more = len(skipped) - _MAX_FILES_PER_NOTE
        more = f"\n  and {num_more} more" if num_more > 0 else ""
        notes(f"{root}: skipped files that are not text:\n  " + "\n  ".join(skipped[:_MAX_FILES_PER_NOTE]) + more)


def _read_file(
    path: Path, name: str, split_on: str | None, text_field: str, *, passages: bool, notes: Notes
) -> Iterator[Document]:
    """The rows or pieces of a file as documents. Blank pieces are dropped; a blank file is one empty document."""
    if content_suffix(path) in ROW_SUFFIXES or (content_suffix(path) == JSON and holds_rows(path, text_field)):
        for idx, text in enumerate(read_rows(path, text_field, notes)):
            yield Document(name=f"{name}#{idx}", text=text)
        return
    pieces = read_pieces(path, split_on, passages=passages, notes=notes)
    texts = (piece for piece in pieces if piece.strip())
    first = next(texts, "")
    second = next(texts, None)
    yield Document(name=name if second is None else f"{name}#0", text=first)
    rest = () if second is None else itertools.chain([second], texts)
    yield from (Document(name=f"{name}#{idx}", text=piece) for idx, piece in enumerate(rest, start=1))


def _read_dataset(source: str, text_field: str, notes: Notes) -> Iterator[Document]:
    name, _, config = source.partition(":")
    notes(f"{source!r} is not a file or folder: trying the Hugging Face dataset of that name ...")
    try:
        _check_hub(name)
        import datasets  # a slow import, needed only here

        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for idx, row in enumerate(rows):
            yield Document(
                name=f"{source}#{idx}", text=row_text(row, text_field, f"dataset {source}, row {idx + 1}", notes)
            )
    except ImportError:
        raise ChorusError(
            f"corpus {source!r} is neither a file nor a folder, and Hugging Face datasets are not installed. "
            "Check the path, or `pip install datasets`."
        ) from None
    except ChorusError:
        raise
    except Exception as error:  # noqa: BLE001 - the Hub, HTTP and every file format raise their own
        raise ChorusError(
            f"corpus {source!r} is neither a file nor a folder, and the dataset of that name cannot be loaded: {error}"
        ) from None


def _check_hub(name: str) -> None:
    """Fail at once where loading would retry for half a minute. A cached dataset does not need the Hub."""
    from huggingface_hub import HfApi, constants

    cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
    if not Path(cache, name.replace("/", "___")).is_dir():
        HfApi().dataset_info(name, timeout=10)
