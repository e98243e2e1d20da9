"""Documents out of text: what a corpus is to every stage, whether it comes from a file, a folder, a dataset or Python itself.

A document is the unit that splits keep whole: two parts of one document never lie on both sides of a split.
It knows nothing of tokens.
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

# Not prose or code by people for people: tests, generated tables, bundled applications.
_STDLIB_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "turtledemo",
    "pydoc_data",
    "ensurepip",
    "distutils",
}
_STDLIB_LEFT_OUT |= {"site-packages", "dist-packages", "__pycache__"}
_TEXT_SUFFIXES = {"", ".txt", ".md", ".rst", ".tex", ".html", ".csv", ".tsv", ".org", ".text"}
_CODE_SUFFIXES = {
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".rs",
    ".go",
    ".java",
    ".js",
    ".ts",
    ".rb",
    ".sh",
}
_CODE_SUFFIXES |= {
    ".jl",
    ".r",
    ".scala",
    ".kt",
    ".swift",
    ".php",
    ".pl",
    ".lua",
    ".hs",
    ".ml",
    ".sql",
    ".json",
    ".yaml",
    ".toml",
}
_READ_SUFFIXES = _TEXT_SUFFIXES | _CODE_SUFFIXES | ROW_SUFFIXES
_FEW_FILES = 20  # of a folder: too few documents for splits, so that long ones are cut into passages
_LONG_BYTES = 16_000  # of such a file
_NAMED = 5  # files in one note
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:.+)?")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A piece of text that belongs together."""

    name: str
    text: str


def read_documents(source: str, *, split_on: str | None = None, text_field: str = "text") -> Iterator[Document]:
    """Yield the documents of a corpus that hold text, in an order that is the same on every run; see `read_all_documents`."""
    notes, num_empty = Notes(), 0
    for document in read_all_documents(source, split_on=split_on, text_field=text_field, notes=notes):
        if document.text.strip():
            yield document
        else:
            num_empty += 1
    if num_empty:
        notes(
            f"{source}: {num_empty} document{'s hold' if num_empty > 1 else ' holds'} no text and stay{'s' * (num_empty == 1)} out."
        )


def read_all_documents(
    source: str, *, split_on: str | None = None, text_field: str = "text", notes: Notes | None = None
) -> Iterator[Document]:
    """Yield the documents of a corpus, empty ones too, in an order that is the same on every run.

    Args:
        source: `stdlib` (the running Python's standard library), a text file, a folder (every text or code file in it is a
            document; every row of a `.jsonl` or `.parquet` file or `.json` array in it too), such a file of rows, or the name of a
            Hugging Face dataset, `NAME` or `NAME:CONFIG`, of which the train split is streamed. Files may be compressed.
        split_on: regular expression; a line of a text file where it matches begins a new document. Without it a file is cut
            at lines `<|endoftext|>` if it has any; and a single file without them, or a long one (16 kB) among fewer than 20 in a
            folder, is cut at blank lines into passages of about 4,000 characters, so that it can be split by whole documents at
            all; see `textfile.read_pieces`.
        text_field: the field of a row, or column of a dataset, that holds the text.
        notes: takes what is left out or cut otherwise than the user may expect.

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
                f"{path} is not an array of objects or strings, nor one object per line. Take the list of documents out of it, "
                "for example with `jq -c '.data[]'`, and name its text with --text-field."
            )
    elif path.exists():
        raise ChorusError(
            f"corpus {source!r} is neither a file nor a folder. It is read several times: write it to a file."
        )
    elif _is_like_a_path(source):
        raise ChorusError(
            f"corpus {source!r} does not exist. Give a text file, a folder, a dataset name or `{STDLIB}`."
        )
    else:
        documents = _read_dataset(source, text_field, notes)
    return documents


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """A document without its text: enough to sample and deal a corpus that does not fit into memory."""

    idx: int
    """Its place in the order of reading."""
    num_bytes: int
    num_characters: int


def survey_documents(documents: Iterable[Document]) -> Iterator[Outline]:
    """Outlines of the distinct documents, in the order of reading. Memory: a few hundred bytes for each.

    Exact duplicates are dropped: one copy in the train split and one in a held-out split would flatter every loss.
    """
    seen: set[bytes] = set()
    for idx, document in enumerate(documents):
        encoded = document.text.encode()
        digest = hashlib.sha256(encoded).digest()
        if digest not in seen:
            seen.add(digest)
            yield Outline(idx=idx, num_bytes=len(encoded), num_characters=len(document.text))


def sample_outlines(outlines: Iterable[Outline], *, max_bytes: int | None, seed: int) -> list[Outline]:
    """Outlines in a seeded random order, up to about `max_bytes` of UTF-8; all of them without a limit.

    Documents of at most a fortieth of the limit come first: a sample of a few long documents has splits that hang on one of them,
    and intervals over documents that mean little. One that would pass the limit is left out; smaller ones after it may still fit.
    """
    shuffled = list(outlines)
    random.Random(seed).shuffle(shuffled)
    if max_bytes is None:
        return shuffled
    shuffled.sort(key=lambda outline: outline.num_bytes * 40 > max_bytes)  # stable: else as shuffled
    sampled, num_bytes = [], 0
    for outline in shuffled:
        if num_bytes + outline.num_bytes <= max_bytes:
            sampled.append(outline)
            num_bytes += outline.num_bytes
    return sampled


def split_outlines(outlines: list[Outline], fractions: dict[str, float]) -> dict[str, list[Outline]]:
    """Deal documents into splits whose sizes in characters approach `fractions`; a document is never cut.

    The order is taken as it comes (`sample_outlines` shuffles). Each document goes to the split that lacks most of its share,
    so that a few long documents do not starve a small split.

    Raises:
        ChorusError: a split that should have text got no document.
    """
    if not outlines:
        raise ChorusError(
            "the corpus is empty: no document holds any text. Give a corpus with at least a few documents."
        )
    total = sum(outline.num_characters for outline in outlines)
    wanted = {name: fraction * total for name, fraction in fractions.items() if fraction > 0}
    splits: dict[str, list[Outline]] = {name: [] for name in wanted}
    filled = dict.fromkeys(wanted, 0)
    for outline in outlines:
        name = max(wanted, key=lambda split: (wanted[split] - filled[split]) / wanted[split])
        splits[name].append(outline)
        filled[name] += outline.num_characters
    if empty := [name for name, held in splits.items() if not held]:
        raise ChorusError(
            f"the corpus is too small for its splits: {len(outlines)} documents leave {', '.join(empty)} empty. "
            f"At least {len(wanted)} documents are needed, some dozens are wise: give more text, "
            "or cut it into more documents with --split-on."
        )
    return splits


def sample_documents(documents: Iterable[Document], *, max_bytes: int | None, seed: int) -> list[Document]:
    """Distinct documents of a corpus that fits into memory; see `survey_documents` and `sample_outlines`."""
    held = list(documents)
    return [held[outline.idx] for outline in sample_outlines(survey_documents(held), max_bytes=max_bytes, seed=seed)]


def split_documents(documents: list[Document], fractions: dict[str, float]) -> dict[str, list[Document]]:
    """Documents that fit into memory, dealt to splits; see `split_outlines`."""
    outlines = [
        Outline(idx=idx, num_bytes=0, num_characters=len(document.text)) for idx, document in enumerate(documents)
    ]
    dealt = split_outlines(outlines, fractions)
    return {name: [documents[outline.idx] for outline in held] for name, held in dealt.items()}


def _is_like_a_path(source: str) -> bool:
    """Whether what does not exist can only have been meant as a file or folder."""
    suffixes = (_READ_SUFFIXES | COMPRESSED_SUFFIXES) - {""}
    return source.lower().endswith(tuple(suffixes)) or source.startswith(".") or not _DATASET.fullmatch(source)


def _read_stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _STDLIB_LEFT_OUT.intersection(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():  # an empty __init__.py is no mistake here
            yield Document(name=str(relative), text=text)


def locate(source: str) -> Path:
    """The path that a corpus may be.

    Raises:
        ChorusError: the system cannot look there, or the name is not UTF-8 and could not be recorded.
    """
    if any("\ud800" <= character <= "\udfff" for character in source):
        raise ChorusError(f"the name of corpus {source!r} is not UTF-8. Rename it, or give the folder that it is in.")
    try:
        Path(source).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be a dataset
    except OSError as error:
        raise ChorusError(f"corpus {source[:200]!r} cannot be read: {error.strerror}.") from None
    return Path(source)


def walk(root: Path, notes: Notes) -> list[Path]:
    """All files below a folder but hidden ones, sorted. Links are followed; no folder is entered twice, none above it at all."""
    files: list[Path] = []
    entered = {_identity(parent) for parent in root.resolve().parents}

    def skip(error: OSError) -> None:
        notes(f"{error.filename} is left out: {error.strerror}.")

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
        notes(f"{root}: left out, as files of other kinds: {kinds}.")
    if not paths:
        raise ChorusError(f"the corpus is empty: the folder {root} holds no text files.")
    left_out: list[str] = []
    for path in paths:
        name, num_given = str(path.relative_to(root)), 0
        cut = len(paths) == 1 or (len(paths) < _FEW_FILES and path.stat().st_size > _LONG_BYTES)
        try:
            for document in _read_file(path, name, split_on, text_field, passages=cut, notes=notes):
                yield document
                num_given += 1
        except ChorusError as error:
            # A file of rows that breaks off is no stray file, and an array without the field may be one: data of code.
            if num_given or not (isinstance(error, NotTextError) or content_suffix(path) == JSON):
                raise
            left_out.append(str(error))
    if len(left_out) == len(paths):
        raise ChorusError(f"the folder {root} holds no text that can be read. {left_out[0]}")
    if left_out:
        more = f"\n  and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        notes(f"{root}: left out, as they cannot be read as text:\n  " + "\n  ".join(left_out[:_NAMED]) + more)


def _read_file(
    path: Path, name: str, split_on: str | None, text_field: str, *, passages: bool, notes: Notes
) -> Iterator[Document]:
    """Its rows or pieces as documents; what is blank between two marks is none, a blank file is one."""
    if content_suffix(path) in ROW_SUFFIXES or (content_suffix(path) == JSON and holds_rows(path, text_field)):
        for idx, text in enumerate(read_rows(path, text_field, notes)):
            yield Document(name=f"{name}#{idx}", text=text)
        return
    pieces = read_pieces(path, split_on, passages=passages, notes=notes)
    held = (piece for piece in pieces if piece.strip())
    first = next(held, "")
    second = next(held, None)
    yield Document(name=name if second is None else f"{name}#0", text=first)
    rest = () if second is None else itertools.chain([second], held)
    yield from (Document(name=f"{name}#{idx}", text=piece) for idx, piece in enumerate(rest, start=1))


def _read_dataset(source: str, text_field: str, notes: Notes) -> Iterator[Document]:
    name, _, config = source.partition(":")
    notes(f"{source!r} is no file or folder here: trying the Hugging Face dataset of that name ...")
    try:
        _check_hub(name)
        import datasets  # heavy, and needed for this source alone

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
    except Exception as error:  # noqa: BLE001 - of the Hub, of HTTP, of every builder and file format
        raise ChorusError(
            f"corpus {source!r} is neither a file nor a folder, and the dataset of that name cannot be loaded: {error}"
        ) from None


def _check_hub(name: str) -> None:
    """Raise at once what loading would raise after half a minute of retries; a dataset that is kept here needs no Hub."""
    from huggingface_hub import HfApi, constants

    kept = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
    if not Path(kept, name.replace("/", "___")).is_dir():
        HfApi().dataset_info(name, timeout=10)
