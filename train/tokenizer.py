"""Trains the tokenizer of a new population on its train split, or copies an existing one, as Hugging Face files."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from chorus.population.errors import ChorusError
from chorus.population.files import write_text
from chorus.population.tokens import TextTokenizer

BOS, EOS = "<|bos|>", "<|eos|>"
# For a base model: turns are plain paragraphs, common in training text, without markers that it has never seen.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set text = message['content'] -%}
{%- else -%}{%- set text = message['content'] | map(attribute='text') | join('') -%}
{%- endif -%}
{{ message['role'] + ': ' + text + '\n\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path, *, context_length: int) -> TextTokenizer:
    """Train a byte-level BPE and write its files to `directory`.

    `<|bos|>` is added in front of every prompt, as in front of every document in training.

    Raises:
        ChorusError: the text is too small for a vocabulary of that size.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) != vocab_size:
        raise ChorusError(
            f"the train split yields only {found} tokens, not --vocab-size {vocab_size}: it is too small for a larger vocabulary. "
            f"Lower --vocab-size to {found} or less, or add text."
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # <|bos|> spelled out in a prompt is plain text, as in training
    }
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(directory / "chat_template.jinja", CHAT_TEMPLATE)
    return TextTokenizer.load(directory)


def given_tokenizer(path: Path, directory: Path) -> TextTokenizer:
    """Copy a tokenizer to `directory`, converted to a fast one if needed.

    Args:
        path: a directory in the Hugging Face format, or a `tokenizer.json`.
        directory: the target.

    Raises:
        ChorusError: there is no usable tokenizer at `path`.
    """
    if not path.exists():
        raise ChorusError(f"--tokenizer {path} does not exist. Use a directory with a tokenizer, or a tokenizer.json.")
    directory.mkdir(parents=True, exist_ok=True)
    source = path if path.is_dir() else path.parent
    if path.is_file() and path.name != "tokenizer.json":
        raise ChorusError(f"--tokenizer {path} is not a tokenizer.json. Use that file or its directory.")
    if (source / "tokenizer.json").is_file():
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
    else:
        _convert(source, directory)
    if not (directory / "chat_template.jinja").exists() and "chat_template" not in _config(directory):
        write_text(directory / "chat_template.jinja", CHAT_TEMPLATE)
    try:
        tokenizer = TextTokenizer.load(directory)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises plain Exceptions
        raise ChorusError(f"--tokenizer {path} cannot be read ({error}). Use a fast Hugging Face tokenizer.") from None
    if tokenizer.highest_id >= tokenizer.vocab_size:
        raise ChorusError(
            f"--tokenizer {path} has {tokenizer.vocab_size:,} tokens but ids up to {tokenizer.highest_id:,}: a model has "
            "only one embedding row per token. Use a tokenizer whose ids run from 0 without gaps."
        )
    return tokenizer


def _config(directory: Path) -> dict[str, object]:
    path = directory / "tokenizer_config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _convert(source: Path, directory: Path) -> None:
    from transformers import AutoTokenizer  # a slow import, needed only here

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, use_fast=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ChorusError(
            f"--tokenizer {source} contains no tokenizer that can be converted ({reason}). Use one with a tokenizer.json."
        ) from None
    if not tokenizer.is_fast:
        raise ChorusError(f"--tokenizer {source} has no fast version. Use a tokenizer with a tokenizer.json.")
    tokenizer.save_pretrained(directory)
