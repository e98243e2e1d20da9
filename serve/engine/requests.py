"""Refuse, at the door, what a request cannot ask of a population: vLLM's API server answers with a 400."""

from functools import wraps
from pathlib import Path
from typing import Any

from chorus.population.errors import ChorusError
from chorus.serve.engine.deadline import (
    BUDGET_ARGUMENT,
    EXPECTED_ARGUMENT,
    FLOOR_ARGUMENT,
    MOST_ARGUMENT,
    REPORT_ARGUMENT,
)
from chorus.serve.engine.mixture import MEMBER_ARGUMENT, TIER_ARGUMENT, Prior

_COUNTS = {MOST_ARGUMENT: "members", EXPECTED_ARGUMENT: "tokens"}
_ARGUMENTS = (TIER_ARGUMENT, MEMBER_ARGUMENT, BUDGET_ARGUMENT, FLOOR_ARGUMENT, *_COUNTS, REPORT_ARGUMENT)


def check(arguments: dict[str, Any], prior: Prior) -> None:
    """Check a request's `vllm_xargs`.

    Raises:
        ChorusError: a tier or member does not exist, a number is out of range, or a key that is ours is misspelt.
    """
    if unknown := sorted(key for key in arguments if key.startswith("chorus_") and key not in _ARGUMENTS):
        raise ChorusError(f"vllm_xargs: unknown {', '.join(unknown)}; there are {', '.join(_ARGUMENTS)}")
    try:
        prior.asked_by(arguments)
        if FLOOR_ARGUMENT in arguments:
            prior.mixture(arguments[FLOOR_ARGUMENT])
    except ChorusError as error:
        named = [key for key in (TIER_ARGUMENT, MEMBER_ARGUMENT, FLOOR_ARGUMENT) if key in arguments]
        raise ChorusError(f"vllm_xargs ({', '.join(named)}): {error}") from None
    budget_ms = arguments.get(BUDGET_ARGUMENT, 1)
    if isinstance(budget_ms, bool) or not isinstance(budget_ms, int | float) or not 0 < budget_ms < float("inf"):
        raise ChorusError(f"vllm_xargs.{BUDGET_ARGUMENT}: {budget_ms!r} is not a positive number of milliseconds")
    for key, what in _COUNTS.items():
        count = arguments.get(key, 1)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ChorusError(f"vllm_xargs.{key}: {count!r} is not a number of {what} from 1 on")
    if not isinstance(mark := arguments.get(REPORT_ARGUMENT, ""), str):
        raise ChorusError(f"vllm_xargs.{REPORT_ARGUMENT}: {mark!r} is not a text with which the report is to begin")


def check_every_request(model: str) -> None:
    """Make vLLM's own check of a request's parameters include ours. Called once per process that takes requests."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    prior = Prior(Path(model))
    plain = getattr(InputProcessor._validate_params, "plain", InputProcessor._validate_params)

    @wraps(plain)
    def validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            check(getattr(params, "extra_args", None) or {}, prior)
        except ChorusError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        return plain(self, params, *args, **kwargs)

    validate.plain = plain  # type: ignore[attr-defined]
    InputProcessor._validate_params = validate
