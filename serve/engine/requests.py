"""Refuse, at the door, what a request cannot ask of a population: vLLM's API server answers with a 400."""

from functools import wraps
from pathlib import Path
from typing import Any

from chorus.population.errors import ChorusError
from chorus.population.manifest import DECODINGS
from chorus.serve.engine.deadline import (
    BUDGET_ARGUMENT,
    EXPECTED_ARGUMENT,
    FLOOR_ARGUMENT,
    MOST_ARGUMENT,
    REPORT_ARGUMENT,
)
from chorus.serve.engine.decoding import DECODING_ARGUMENT, why_not_sampled, why_not_speculative
from chorus.serve.engine.mixture import MEMBER_ARGUMENT, TIER_ARGUMENT, Prior

_COUNT_ARGUMENTS = {MOST_ARGUMENT: "members", EXPECTED_ARGUMENT: "tokens"}
_ARGUMENTS = (
    TIER_ARGUMENT,
    MEMBER_ARGUMENT,
    DECODING_ARGUMENT,
    BUDGET_ARGUMENT,
    FLOOR_ARGUMENT,
    *_COUNT_ARGUMENTS,
    REPORT_ARGUMENT,
)


def check(parameters: Any, prior: Prior) -> None:
    """Check the `vllm_xargs` of a request with these `SamplingParams`.

    Raises:
        ChorusError: a tier or member does not exist, a number is out of range, a key that is ours is misspelt, or members are to be
            sampled where that would not be exact.
    """
    arguments: dict[str, Any] = getattr(parameters, "extra_args", None) or {}
    if unknown := sorted(key for key in arguments if key.startswith("chorus_") and key not in _ARGUMENTS):
        raise ChorusError(f"vllm_xargs: unknown {', '.join(unknown)}; there are {', '.join(_ARGUMENTS)}")
    try:
        mixture = prior.resolve(arguments)
        if FLOOR_ARGUMENT in arguments:
            prior.mixture(arguments[FLOOR_ARGUMENT])
    except ChorusError as error:
        named = [key for key in (TIER_ARGUMENT, MEMBER_ARGUMENT, FLOOR_ARGUMENT) if key in arguments]
        raise ChorusError(f"vllm_xargs ({', '.join(named)}): {error}") from None
    budget_ms = arguments.get(BUDGET_ARGUMENT, 1)
    if isinstance(budget_ms, bool) or not isinstance(budget_ms, int | float) or not 0 < budget_ms < float("inf"):
        raise ChorusError(f"vllm_xargs.{BUDGET_ARGUMENT}: {budget_ms!r} is not a positive number of milliseconds")
    for key, unit in _COUNT_ARGUMENTS.items():
        count = arguments.get(key, 1)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ChorusError(f"vllm_xargs.{key}: {count!r} is not a number of {unit} from 1 on")
    decoding = arguments.get(DECODING_ARGUMENT, "auto")
    if decoding not in DECODINGS:
        raise ChorusError(f"vllm_xargs.{DECODING_ARGUMENT}: {decoding!r} is none of {', '.join(DECODINGS)}")
    if decoding == "sampled" and (reason := why_not_sampled(parameters, mixture)) is not None:
        raise ChorusError(
            f"vllm_xargs.{DECODING_ARGUMENT}: one sampled member per token would not be exact here, since {reason}. Use 'auto', "
            "which takes the fastest exact way."
        )
    if decoding == "speculative" and (reason := why_not_speculative(parameters)) is not None:
        raise ChorusError(
            f"vllm_xargs.{DECODING_ARGUMENT}: speculation would not be exact here, since {reason}. Use 'auto', which takes the "
            "fastest exact way."
        )
    if not isinstance(prefix := arguments.get(REPORT_ARGUMENT, ""), str):
        raise ChorusError(f"vllm_xargs.{REPORT_ARGUMENT}: {prefix!r} is not a text with which the report is to begin")


def install_request_check(model: str) -> None:
    """Make vLLM's own check of a request's parameters include ours. Called once per process that takes requests."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    prior = Prior(Path(model))
    original = getattr(InputProcessor._validate_params, "original", InputProcessor._validate_params)

    @wraps(original)
    def validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            check(params, prior)
        except ChorusError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        self.speculative_config = None  # vLLM would refuse what its drafts cannot do; such requests get no drafts
        return original(self, params, *args, **kwargs)

    validate.original = original  # type: ignore[attr-defined]
    InputProcessor._validate_params = validate


def install_grammar_trials() -> None:
    """Make vLLM's API server try a request's grammar in another process before it looks at it. Called as the one above."""
    from vllm.sampling_params import SamplingParams, check_json_nesting
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.structured_output import backend_xgrammar

    from chorus.serve.engine.grammars import GrammarTrials, validated

    if hasattr(AsyncLLM.add_request, "original"):
        return
    original_init, original_add_request = AsyncLLM.__init__, AsyncLLM.add_request
    original_validate = SamplingParams._validate_structured_outputs

    @wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # Before there are threads, and before this process loses the parser.
        self.grammar_trials = GrammarTrials(kwargs["vllm_config"] if "vllm_config" in kwargs else args[0])
        backend_xgrammar.validate_xgrammar_grammar = check_nesting
        original_init(self, *args, **kwargs)

    @wraps(original_add_request)
    async def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        await self.grammar_trials.check(params)
        return await original_add_request(self, request_id, prompt, params, *args, **kwargs)

    @wraps(original_validate)
    def validate(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.structured_outputs is None or self.structured_outputs is not validated.get():
            original_validate(self, *args, **kwargs)

    def check_nesting(params: Any) -> None:
        """In place of the parser, which vLLM also calls while it reads a request: here nothing could stop it."""
        check_json_nesting(params.structured_outputs.json)
        check_json_nesting(params.structured_outputs.structural_tag, structural_tag=True)

    add_request.original = original_add_request  # type: ignore[attr-defined]
    AsyncLLM.__init__, AsyncLLM.add_request = init, add_request
    SamplingParams._validate_structured_outputs = validate
