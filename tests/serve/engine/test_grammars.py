"""Grammars are tried before an engine sees them: what is right passes, what is wrong or too large is refused with a sentence.

No engine: the configuration holds what vLLM's parsers look at.
"""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.worlds import save_tokenizer

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own, while it is imported

ALTERNATIVES = "(a|b){1,5000}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return make_config(directory)


def make_config(directory: Path) -> Any:
    model = SimpleNamespace(
        **{"is_diffusion": False, "skip_tokenizer_init": False, "get_vocab_size": lambda: 512, "model": str(directory)},
        **{"tokenizer": str(directory), "tokenizer_mode": "hf", "tokenizer_revision": None, "trust_remote_code": False},
        **{"runner_type": "generate", "hf_config": SimpleNamespace(model_type="llama"), "is_mm_encoder_only": False},
    )
    structured = SimpleNamespace(
        **{"backend": "auto", "disable_any_whitespace": False, "disable_additional_properties": False}
    )
    return SimpleNamespace(model_config=model, structured_outputs_config=structured, speculative_config=None)


@pytest.fixture(scope="module", autouse=True)
def _prepared(config: Any) -> None:
    from vllm.tokenizers import cached_tokenizer_from_config

    cached_tokenizer_from_config(model_config=config.model_config)


def check(config: Any, *constraints: dict[str, Any], cpu_s: float = 2.0) -> list[Any]:
    """What became of each constraint: the parameters, or the error."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    from chorus.serve.engine.grammars import GrammarTrials

    async def try_all() -> list[Any]:
        trials = GrammarTrials(config, cpu_s=cpu_s)
        asked = [SamplingParams(structured_outputs=StructuredOutputsParams(**each)) for each in constraints]
        try:
            found = await asyncio.gather(*(trials.check(each) for each in asked), return_exceptions=True)
        finally:
            trials.close()
        return [error or params.structured_outputs for error, params in zip(found, asked, strict=True)]

    return asyncio.run(try_all())


def doubling(num_rules: int) -> str:
    rules = (f"a{idx} ::= a{idx + 1} a{idx + 1} | a{idx + 1}" for idx in range(num_rules))
    return "\n".join(["root ::= a0", *rules, f'a{num_rules} ::= "x"'])


def patterns(number: int, pattern: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {f"p{idx}": {"type": "string", "pattern": pattern} for idx in range(number)},
    }


TREE = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": []}},
    "$ref": "#/$defs/node",
}


def test_what_is_right_passes_with_the_backend_that_can_do_it(config: Any) -> None:
    person = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
    even = {"type": "integer", "multipleOf": 2}
    found = check(
        config,
        *({"json": schema} for schema in (person, json.dumps(person), TREE, even)),
        {"regex": r"\d{4}-\d{2}"},
        {"regex": r"\p{L}+"},
        {"choice": ["yes", 'with "quotes"']},
        {"grammar": 'root ::= "a" | "b" root'},
        {"json_object": True},
        cpu_s=10.0,
    )
    xgrammar, guidance = "xgrammar", "guidance"
    backends = [xgrammar, xgrammar, xgrammar, guidance, xgrammar, guidance, xgrammar, xgrammar, xgrammar]
    assert [each._backend for each in found] == backends
    assert found[6].choice is None
    assert 'with \\"quotes\\"' in found[6].grammar


@pytest.mark.parametrize(
    "constraint",
    [
        {"grammar": doubling(2000)},
        {"grammar": doubling(20)},
        {"json": patterns(50, ALTERNATIVES)},
        {"json": patterns(1, ALTERNATIVES)},
        {"json": {"enum": [f"v{idx}" for idx in range(100_000)]}},
    ],
    ids=["doubling", "few-doubling", "patterns", "pattern", "enum"],
)
def test_what_takes_too_much_is_refused_with_a_sentence(config: Any, constraint: dict[str, Any]) -> None:
    from vllm.exceptions import VLLMValidationError

    (error,) = check(config, constraint)
    assert isinstance(error, VLLMValidationError)
    assert "make it simpler" in str(error)


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": 'root ::= "a'}, "invalid structured output"),
        (
            {"json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
            "no text matches the grammar",
        ),
        ({"json": {"$ref": "#"}}, "no text matches the grammar"),
        ({"json": {"$ref": "#/nowhere"}}, "invalid structured output"),
        ({"json": {"type": "nothing"}}, "invalid structured output"),
        ({"structural_tag": "{}"}, "invalid structured output"),
    ],
)
def test_what_is_wrong_is_refused_with_a_sentence(config: Any, constraint: dict[str, Any], says: str) -> None:
    from vllm.exceptions import VLLMValidationError

    (error,) = check(config, constraint)
    assert isinstance(error, VLLMValidationError), error
    assert says in str(error).lower()
    assert "/project/" not in str(error)


def test_a_grammar_is_tried_once_for_all_who_ask_for_it(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from chorus.serve.engine.trials import Trials

    jobs, plain = [], Trials.run

    async def run(self: Trials, job: bytes) -> bytes | None:
        jobs.append(job)
        return await plain(self, job)

    monkeypatch.setattr(Trials, "run", run)
    found = check(config, *[{"regex": "[ab]+"}] * 40, cpu_s=10.0)
    assert {each._backend for each in found} == {"xgrammar"}
    assert len(jobs) == 1


def test_a_grammar_that_takes_too_long_for_each_token_ends_its_own_request() -> None:
    from chorus.serve.engine.grammars import Metered

    class Slow:
        def fill_bitmask(self, bitmask: Any, idx: int) -> None:
            sum(range(3_000_000))

        def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
            return True

    grammar = Metered(Slow())
    num_tokens = 0
    grammar.fill_bitmask(None, 0)
    while grammar.accept_tokens("a", [1]) and num_tokens < 500:
        num_tokens += 1
        grammar.fill_bitmask(None, 0)
    assert 1 <= num_tokens < 500
    assert grammar.is_exhausted


def test_each_request_is_compiled_by_its_own_backend(config: Any) -> None:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.tokenizers import cached_tokenizer_from_config
    from vllm.v1.structured_output.request import StructuredOutputRequest

    from chorus.serve.engine.grammars import GrammarManager

    manager: Any = object.__new__(GrammarManager.__mro__[1])
    manager.vllm_config, manager.tokenizer = config, cached_tokenizer_from_config(model_config=config.model_config)
    manager._use_async_grammar_compilation = False
    adopted = GrammarManager.adopt(manager)
    for regex, backend in (("[ab]+", "xgrammar"), (r"\p{L}+", "guidance"), ("[cd]+", "xgrammar")):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(regex=regex))
        params.structured_outputs._backend = backend
        request = SimpleNamespace(
            request_id="a",
            sampling_params=params,
            structured_output_request=StructuredOutputRequest.from_sampling_params(params),
        )
        adopted.grammar_init(request)
        grammar = request.structured_output_request.grammar
        assert type(grammar._grammar).__name__.lower().startswith(backend)
