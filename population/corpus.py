"""Documents out of text: what a corpus is to every stage, whether it comes from a file, a folder, a dataset or Python itself.

A document is the unit that splits keep whole: two parts of one document never lie on both sides of a split.
It knows nothing of tokens.
"""

import hashlib
import itertools
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chorus.population.errors import ChorusError
from chorus.population.rows import ROW_SUFFIXES, read_rows
from chorus.population.textfile import read_pieces

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


@dataclass(frozen=True, kw_only=True)
class Document:
    """A piece of text that belongs together."""

    name: str
    text: str


def read_documents(source: str, *, split_on: str | None = None, text_field: str = "text") -> Iterator[Document]:
    """Yield the documents of a corpus that hold text, in an order that is the same on every run; see `read_all_documents`."""
    documents = read_all_documents(source, split_on=split_on, text_field=text_field)
    return (document for document in documents if document.text.strip())


def read_all_documents(source: str, *, split_on: str | None = None, text_field: str = "text") -> Iterator[Document]:
    """Yield the documents of a corpus, empty ones too, in an order that is the same on every run.

    Args:
        source: `stdlib` (the running Python's standard library), a text file, a folder (every text or code file in it is a
            document; every row of a `.jsonl` or `.parquet` file in it too), such a file of rows, or the name of a Hugging Face
            dataset, `NAME` or `NAME:CONFIG`, of which the train split is streamed.
        split_on: regular expression; a line of a text file where it matches begins a new document. Without it a file is cut
            at lines `<|endoftext|>` if it has any; and a single file without them is cut at blank lines into passages of
            about 4,000 characters, so that it can be split by whole documents at all.
        text_field: the field of a row, or column of a dataset, that holds the text.

    Raises:
        ChorusError: the source does not exist or is not UTF-8, or the dataset cannot be loaded.
    """
    path = Path(source)
    if source == STDLIB:
        documents = _read_stdlib()
    elif path.is_dir():
        documents = _read_folder(path, split_on, text_field)
    elif path.is_file() and path.suffix.lower() in ROW_SUFFIXES:
        documents = _read_rows(path, path.name, text_field)
    elif path.is_file():
        documents = _read_file(path, path.name, split_on, passages=True)
    elif path.suffix in {".txt", ".md", *ROW_SUFFIXES} or source.startswith((".", "/", "~")):
        raise ChorusError(
            f"corpus {source!r} does not exist. Give a text file, a folder, a dataset name or `{STDLIB}`."
        )
    else:
        documents = _read_dataset(source, text_field)
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


def _read_stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _STDLIB_LEFT_OUT.intersection(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():  # an empty __init__.py is no mistake here
            yield Document(name=str(relative), text=text)


def _read_folder(root: Path, split_on: str | None, text_field: str) -> Iterator[Document]:
    suffixes = _TEXT_SUFFIXES | _CODE_SUFFIXES | ROW_SUFFIXES
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix.lower() in suffixes]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not paths:
        raise ChorusError(f"the corpus is empty: the folder {root} holds no text files.")
    for path in paths:
        name = str(path.relative_to(root))
        if path.suffix.lower() in ROW_SUFFIXES:
            yield from _read_rows(path, name, text_field)
        else:
            yield from _read_file(path, name, split_on, passages=len(paths) == 1)


def _read_rows(path: Path, name: str, text_field: str) -> Iterator[Document]:
    for idx, text in enumerate(read_rows(path, text_field)):
        yield Document(name=f"{name}#{idx}", text=text)


def _read_file(path: Path, name: str, split_on: str | None, *, passages: bool) -> Iterator[Document]:
    """Its pieces as documents; what is blank between two marks is none, a blank file is one."""
    pieces = read_pieces(path, split_on, passages=passages)
    held = (piece for piece in pieces if piece.strip())
    first = next(held, "")
    second = next(held, None)
    yield Document(name=name if second is None else f"{name}#0", text=first)
    rest = () if second is None else itertools.chain([second], held)
    yield from (Document(name=f"{name}#{idx}", text=piece) for idx, piece in enumerate(rest, start=1))


def _read_dataset(source: str, text_field: str) -> Iterator[Document]:
    name, _, config = source.partition(":")
    try:
        import datasets  # heavy, and needed for this source alone
    except ImportError:
        raise ChorusError(
            f"corpus {source!r} is neither a file nor a folder, and Hugging Face datasets are not installed. "
            "Check the path, or `pip install datasets`."
        ) from None
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for idx, row in enumerate(rows):
            if text_field not in row:
                raise ChorusError(
                    f"dataset {source!r} has no column {text_field!r}; it has {', '.join(row)}. Name it with --text-field."
                )
            yield Document(name=f"{source}#{idx}", text=row[text_field])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ChorusError(
            f"corpus {source!r} is neither a file nor a folder, and the dataset of that name cannot be loaded: {error}"
        ) from None
