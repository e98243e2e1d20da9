"""Checks requests in vLLM's API server, which refuses invalid ones with 400 before they reach the engine core."""

from functools import wraps
from pathlib import Path
from typing import Any

from chorus.population.errors import ChorusError
from chorus.population.manifest import DECODINGS
from chorus.population.wire import (
    BUDGET_ARGUMENT,
    DECODING_ARGUMENT,
    EXPECTED_TOKENS_ARGUMENT,
    FLOOR_ARGUMENT,
    MAX_MEMBERS_ARGUMENT,
    MEMBER_ARGUMENT,
    REPORT_ARGUMENT,
    RESERVED_PREFIX,
    TIER_ARGUMENT,
)
from chorus.serve.engine.decoding import why_not_sampled, why_not_speculative
from chorus.serve.engine.mixture import Prior

_COUNT_ARGUMENTS = {MAX_MEMBERS_ARGUMENT: "members", EXPECTED_TOKENS_ARGUMENT: "tokens"}
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
        ChorusError: a tier or member does not exist, a value is out of range, a `chorus_` key is unknown, or the requested decoding
            would not be exact.
    """
    arguments: dict[str, Any] = getattr(parameters, "extra_args", None) or {}
    if unknown := sorted(key for key in arguments if key.startswith(RESERVED_PREFIX) and key not in _ARGUMENTS):
        raise ChorusError(f"vllm_xargs: unknown keys {', '.join(unknown)}; supported are {', '.join(_ARGUMENTS)}")
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
            raise ChorusError(f"vllm_xargs.{key}: {count!r} is not a whole number of {unit}, at least 1")
    decoding = arguments.get(DECODING_ARGUMENT, "auto")
    if decoding not in DECODINGS:
        raise ChorusError(f"vllm_xargs.{DECODING_ARGUMENT}: {decoding!r} is not one of {', '.join(DECODINGS)}")
    if decoding == "sampled" and (reason := why_not_sampled(parameters, mixture)) is not None:
        raise ChorusError(
            f"vllm_xargs.{DECODING_ARGUMENT}: sampling one member per token would not be exact for this request: {reason}. Use "
            "'auto', which chooses the fastest exact decoding."
        )
    if decoding == "speculative" and (reason := why_not_speculative(parameters)) is not None:
        raise ChorusError(
            f"vllm_xargs.{DECODING_ARGUMENT}: speculation would not be exact for this request: {reason}. Use 'auto', which "
            "chooses the fastest exact decoding."
        )
    if not isinstance(prefix := arguments.get(REPORT_ARGUMENT, ""), str):
        raise ChorusError(f"vllm_xargs.{REPORT_ARGUMENT}: {prefix!r} is not a string to prefix the report with")


def install_request_check(model: str) -> None:
    """Extend vLLM's validation of request parameters by `check`. Call once per process that receives requests."""
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
        # vLLM would refuse parameters that it does not support with drafts; here such requests get no drafts instead.
        self.speculative_config = None
        return original(self, params, *args, **kwargs)

    validate.original = original  # type: ignore[attr-defined]
    InputProcessor._validate_params = validate


def install_grammar_trials() -> None:
    """Make vLLM's API server try a request's grammar in another process before it parses it. Call once per process."""
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
        # Fork before any threads start, and before this process's parser is replaced.
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
        """Replaces the parser, which vLLM also calls while reading a request, where nothing could stop it."""
        check_json_nesting(params.structured_outputs.json)
        check_json_nesting(params.structured_outputs.structural_tag, structural_tag=True)

    add_request.original = original_add_request  # type: ignore[attr-defined]
    AsyncLLM.__init__, AsyncLLM.add_request = init, add_request
    SamplingParams._validate_structured_outputs = validate
