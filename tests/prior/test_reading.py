"""What a corpus is to a population's members: marks around texts, and conversations through the chat template."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from chorus.population import manifest
from chorus.population.corpus import Document
from chorus.population.errors import ChorusError
from chorus.prior import engine as through_engine
from chorus.prior.engine import Engine, engine_losses
from chorus.prior.likelihoods import likelihoods
from chorus.prior.reading import Marks, Reader
from chorus.prior.splits import whole_corpus
from tests.reference import member_log_probs

BOS, EOS = 0, 1
CHATML = """\
{% for m in messages %}{{ '<|bos|>' + m.role + '\\n' + m.content + '<|eos|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}"""
FORGETFUL = """\
{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last or m.role != 'assistant' else 'gone') + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "import what?"},
    {"role": "assistant", "content": "import os"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "return None"},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture
def gathered(tiny_population: Path, tmp_path: Path) -> Path:
    """The same members as checkpoints of unknown making."""
    directory = Path(shutil.copytree(tiny_population, tmp_path / "gathered"))
    population = manifest.load(directory)
    members = tuple(member.model_copy(update={"trajectory": None, "cycle": None}) for member in population.members)
    manifest.save(population.model_copy(update={"members": members}), directory)
    return directory


def add_by_itself(directory: Path, front: str, back: str) -> None:
    """Have the tokenizer put these marks around a text."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    parts = [part for part in (front, "$A", back) if part]
    special = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in {front, back} if mark]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=special)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))


def ids_of(directory: Path, text: str, marks: Marks | None = None) -> list[int]:
    corpus = directory / "corpus.txt"
    corpus.write_text(text)
    documents, encode = Reader.of(manifest.load(directory), directory, marks).open(str(corpus), split_on=None)
    ((ids, is_scored),) = [encode(document) for document in documents]
    assert is_scored is None
    return ids


@pytest.mark.parametrize(("front", "back"), [("", ""), ("<|bos|>", ""), ("", "<|eos|>"), ("<|bos|>", "<|eos|>")])
def test_checkpoints_are_scored_between_what_their_tokenizer_adds(gathered: Path, front: str, back: str) -> None:
    add_by_itself(gathered, front, back)
    tokenizer = AutoTokenizer.from_pretrained(gathered)
    assert ids_of(gathered, "import os") == tokenizer("import os").input_ids
    bare = tokenizer("import os", add_special_tokens=False).input_ids
    assert ids_of(gathered, "import os", "none") == bare
    assert ids_of(gathered, "import os", "both") == [BOS, *bare, EOS]


def test_trained_members_are_scored_between_bos_and_eos_as_they_learned(tiny_population: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_population, tmp_path / "trained"))
    ids = ids_of(directory, "import os")
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert ids_of(directory, "import os", "tokenizer") == ids[:-1]
    assert ids_of(directory, "import os", "none") == ids[1:-1]


def write_conversations(path: Path, *conversations: object, key: str = "messages") -> str:
    path.write_text("".join(json.dumps({key: messages}) + "\n" for messages in conversations))
    return str(path)


def scored_texts(directory: Path, corpus: str) -> list[list[str]]:
    """Of every conversation, the runs of scored tokens as text."""
    documents, encode = Reader.of(manifest.load(directory), directory).open(corpus, split_on=None)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for document in documents:
        ids, is_scored = encode(document)
        assert is_scored is not None
        runs: list[list[int]] = []
        for idx, (token, scored) in enumerate(zip(ids, is_scored, strict=True)):
            if scored and not (idx and is_scored[idx - 1]):
                runs.append([])
            if scored:
                runs[-1].append(token)
        found.append([tokenizer.decode(run) for run in runs])
    return found


def test_the_assistants_answers_are_scored_to_the_token_that_ends_them(gathered: Path) -> None:
    (gathered / "chat_template.jinja").write_text(CHATML)
    corpus = write_conversations(gathered / "talk.jsonl", TALK, TALK[:3])
    assert scored_texts(gathered, corpus) == [["import os<|eos|>", "return None<|eos|>"], ["import os<|eos|>"]]


def test_an_answer_stands_behind_the_tokens_of_the_prompt_that_a_server_makes(gathered: Path) -> None:
    (gathered / "chat_template.jinja").write_text(CHATML)
    corpus = write_conversations(gathered / "talk.jsonl", TALK)
    documents, encode = Reader.of(manifest.load(gathered), gathered).open(corpus, split_on=None)
    ids, is_scored = encode(next(documents))
    assert is_scored is not None
    prompt = AutoTokenizer.from_pretrained(gathered).apply_chat_template(
        TALK[:2], add_generation_prompt=True, return_dict=False
    )
    assert ids[: len(prompt)] == prompt
    assert is_scored.index(True) == len(prompt)


def test_a_template_without_an_end_mark_scores_what_it_puts_behind_an_answer(gathered: Path) -> None:
    assert scored_texts(gathered, write_conversations(gathered / "talk.jsonl", TALK)) == [
        [" import os\n", " return None\n"]
    ]


def test_turns_that_a_template_rewrites_later_are_context(gathered: Path) -> None:
    (gathered / "chat_template.jinja").write_text(FORGETFUL)
    corpus = write_conversations(gathered / "talk.jsonl", TALK[:5])
    assert scored_texts(gathered, corpus) == [[" return None\n"]]


def test_an_opening_of_the_assistant_answers_nobody(gathered: Path) -> None:
    corpus = write_conversations(gathered / "talk.jsonl", [{"role": "assistant", "content": "hello"}, *TALK[1:3]])
    assert scored_texts(gathered, corpus) == [[" import os\n"]]


def test_rows_of_text_are_no_conversations(gathered: Path) -> None:
    corpus = write_conversations(gathered / "text.jsonl", "import os", key="text")
    documents, encode = Reader.of(manifest.load(gathered), gathered).open(corpus, split_on=None)
    assert [encode(document)[1] for document in documents] == [None]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "row 2: `messages` is not a list"),
        ([], "row 2: `messages` is not a list"),
        ([{"content": "no role"}], "row 2: `messages` is not a list"),
        ([TALK[1], {"role": "assistant", "content": 3}], "talk.jsonl#1 cannot be rendered"),
        ([TALK[1], {"role": "assistant"}], "talk.jsonl#1 cannot be rendered"),
    ],
)
def test_what_is_no_conversation_is_named(gathered: Path, messages: Any, says: str) -> None:
    (gathered / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(ChorusError, match=says):
        scored_texts(gathered, write_conversations(gathered / "talk.jsonl", TALK, messages))


def test_conversations_need_a_template(gathered: Path) -> None:
    (gathered / "chat_template.jinja").unlink()
    with pytest.raises(ChorusError, match="no chat template"):
        scored_texts(gathered, write_conversations(gathered / "talk.jsonl", TALK))


def test_an_engine_scores_the_same_tokens_as_this_process(gathered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers alone, in windows of which some hold none."""
    (gathered / "chat_template.jinja").write_text(CHATML)
    population = manifest.load(gathered)
    name = population.members[0].name

    def echo(engine: Engine, who: object, tokens: list[int]) -> list[float]:
        asked.append(len(tokens))
        log_p_TV = member_log_probs(gathered, name, tokens)
        return [float(log_p_TV[idx, token]) for idx, token in enumerate(tokens[1:])]

    asked: list[int] = []
    monkeypatch.setattr(through_engine, "_window_log_p", echo)
    corpus = write_conversations(gathered / "talk.jsonl", TALK, TALK[:3])
    shape = {"context_length": 16, "vocab_size": 512, "max_bytes": 10_000, "split_on": None}
    split = whole_corpus(corpus, Reader.of(population, gathered), **shape)  # type: ignore[arg-type]
    assert len(split.windows) < len(split.split.windows(16))
    assert split.offsets.tolist()[-1] == split.num_scored < len(split.split.tokens) - 2

    losses_N = engine_losses(Engine(url="", model="", is_gateway=False), {}, split)
    here_N = likelihoods(population, gathered, [split])[0]

    np.testing.assert_allclose(losses_N, -np.log(here_N.astype(np.float64)), atol=1e-4)
    assert len(asked) == len(split.windows)


def test_what_is_scored_belongs_to_the_texts_digest(gathered: Path) -> None:
    reader = Reader.of(manifest.load(gathered), gathered)
    corpus = write_conversations(gathered / "talk.jsonl", TALK)
    split = whole_corpus(corpus, reader, context_length=64, vocab_size=512, max_bytes=10_000, split_on=None)
    other = whole_corpus(corpus, reader, context_length=64, vocab_size=512, max_bytes=10_000, split_on=None)
    assert other.is_scored is not None
    assert split.digest == other.digest
    flipped = type(split)(name="corpus", split=split.split, context_length=64, is_scored=~other.is_scored)
    assert flipped.digest != split.digest


def test_a_conversation_is_read_as_a_document(gathered: Path) -> None:
    corpus = write_conversations(gathered / "talk.jsonl", TALK)
    documents, _ = Reader.of(manifest.load(gathered), gathered).open(corpus, split_on=None)
    assert list(documents) == [Document(name="talk.jsonl#0", text=json.dumps({"messages": TALK}, ensure_ascii=False))]
