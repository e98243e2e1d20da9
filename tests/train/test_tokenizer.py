import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chorus.population.errors import ChorusError
from chorus.train.tokenizer import given_tokenizer, train_tokenizer
from tests.worlds import save_tokenizer, some_documents

TEXTS = [document.text for document in some_documents(10)]
ODD = "naïve café — 東京 \U0001f600\n\tdef f(x):\r\n  return '\x00' \\ <|bos|"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 400, directory, context_length=64)
    return directory


def test_text_survives_the_round_trip_through_hugging_face(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for text in (*TEXTS, ODD):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert len(tokenizer) == 400


def test_a_prompt_begins_with_bos_and_a_document_stands_between_its_marks(trained: Path) -> None:
    from chorus.population.tokens import TextTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer("def")["input_ids"][0] == tokenizer.bos_token_id
    ours = TextTokenizer.load(trained).encode_document("def")
    assert ours == [*tokenizer("def")["input_ids"], tokenizer.eos_token_id]


def test_chat_template_takes_strings_and_parts(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]},
    ]
    found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found == "system: Be brief.\n\nuser: Hello there\n\nassistant:"


def test_a_text_too_small_for_the_vocabulary_is_refused_with_the_number_that_fits(tmp_path: Path) -> None:
    with pytest.raises(ChorusError, match=r"only \d+ tokens, not --vocab-size 5000.*Lower --vocab-size to \d+"):
        train_tokenizer(["a few words"], 5_000, tmp_path, context_length=64)


def test_a_given_tokenizer_is_taken_by_directory_or_file(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "given", vocab_size=300)
    for path, out in ((tmp_path / "given", "a"), (tmp_path / "given" / "tokenizer.json", "b")):
        assert given_tokenizer(path, tmp_path / out).vocab_size == 300
        assert (tmp_path / out / "chat_template.jinja").is_file()


def test_a_slow_tokenizer_is_converted(tmp_path: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(97 + i): 2 + i for i in range(26)}, "Ġ": 28, "ab": 29}
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "slow" / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    (tmp_path / "slow" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = given_tokenizer(tmp_path / "slow", tmp_path / "fast")
    assert tokenizer.encode_document("abc") == [0, 29, 4, 1]


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    for path, reason in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "empty", "no tokenizer"),
        (tmp_path / "bad", "cannot be read"),
    ):
        with pytest.raises(ChorusError, match=reason):
            given_tokenizer(path, tmp_path / "out")


def test_text_that_spells_a_mark_is_text_in_training_and_in_prompts(tmp_path: Path) -> None:
    ours = train_tokenizer([*TEXTS, "<|bos|> <|eos|> " * 500], 400, tmp_path, context_length=64)
    assert ours.bos is not None
    text = "say <|eos|> or <|bos|>."
    ids = ours.encode_document(text)
    assert not {ours.bos, ours.eos}.intersection(ids[1:-1])
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == ids[:-1]
