"""Protects other requests from expensive grammars of structured output: each is tried in a separate process first, and metered.

vLLM parses a grammar on its API server's event loop, and compiles it in a thread of the engine core that nothing can stop. A few
hundred bytes can block either forever. Here a process that is killed if it takes too long does both first. A grammar that passed
is not parsed in the API server again, and its compilation in the core is known to end. In the core, its time per token is limited.
"""

import asyncio
import hashlib
import json
import os
import re
import textwrap
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from http import HTTPStatus
from typing import Any, Self

import numpy as np
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_lm_format_enforcer import LMFormatEnforcerBackend
from vllm.v1.structured_output.backend_outlines import OutlinesBackend
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
from vllm.v1.structured_output.request import get_structured_output_key

from chorus.serve.engine.trials import NICENESS, BusyError, Trials

logger = init_logger(__name__)

TRIAL_CPU_S = 10.0
"""CPU time limit of a trial. On a slow core, a string of up to 10,000 characters takes 6 s with a vocabulary of 50,000."""
_TRIAL_MEMORY = 2 << 30
_MAX_WAIT_S = 25.0
"""Longest wait for a trial. An engine without progress for more than 30 s may be considered frozen."""
_MAX_CACHED_RESULTS = 1024
_MASK_BURST_S, _MASK_S_PER_TOKEN = 1.0, 0.01
"""CPU time that a request's grammar may use in the core, where it delays all requests: a token bucket with this capacity, refilled
by this much per generated token. Real schemas take 0.1 to 3 ms per token."""
_NUM_TRIAL_TOKENS = 64
_CONSTRAINT_FIELDS = (
    *("json", "regex", "choice", "grammar", "json_object", "structural_tag"),
    *("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"),
)
_LOG_PREFIX = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
"""Prefix of xgrammar's messages: the time and a source line."""

validated: ContextVar[StructuredOutputsParams | None] = ContextVar("validated", default=None)
"""The parameters that just passed their trial and need no second parse."""


class GrammarTrials:
    """Tries each distinct grammar once. Belongs to one event loop; create it before any threads start, since it forks."""

    def __init__(self, vllm_config: Any, *, cpu_s: float = TRIAL_CPU_S) -> None:
        self._cpu_s = cpu_s
        self._trials = Trials(partial(_make_trial, vllm_config), cpu_s=cpu_s, memory_bytes=_TRIAL_MEMORY)
        self._results: OrderedDict[bytes, asyncio.Task[dict[str, Any] | None]] = OrderedDict()

    def close(self) -> None:
        """End the trial process."""
        self._trials.close()

    async def check(self, params: Any) -> None:
        """Try the grammar in `params`, if there is one, and replace it by the trial's result.

        Raises:
            VLLMValidationError: the grammar is invalid or too expensive.
            GracefulHTTPError: too many trials are waiting (503).
        """
        requested = getattr(params, "structured_outputs", None)
        if requested is None or requested.all_constraints_none():
            return
        result = await self._result(
            json.dumps({name: getattr(requested, name) for name in _CONSTRAINT_FIELDS}).encode()
        )
        if result is None:
            raise VLLMValidationError(
                f"the grammar of the structured output takes more than {self._cpu_s:g} s of CPU time to compile; make it simpler: "
                "use fewer rules, properties, alternatives and repetitions",
                parameter="structured_outputs",
            )
        if "error" in result:
            message = textwrap.shorten(_LOG_PREFIX.sub("", result["error"]), 500, placeholder="...")
            raise VLLMValidationError(message, parameter="structured_outputs")
        params.structured_outputs = StructuredOutputsParams(**result["constraint"])
        params.structured_outputs._backend = result["backend"]
        params.structured_outputs._backend_was_auto = result["was_auto"]
        validated.set(params.structured_outputs)

    async def _result(self, job: bytes) -> dict[str, Any] | None:
        key = hashlib.sha256(job).digest()
        if key not in self._results:
            self._results[key] = asyncio.create_task(self._run_trial(job))
            if len(self._results) > _MAX_CACHED_RESULTS:
                self._results.popitem(last=False)
        self._results.move_to_end(key)
        try:
            async with asyncio.timeout(_MAX_WAIT_S):
                result = await asyncio.shield(self._results[key])
        except TimeoutError:
            raise _overloaded_error() from None
        if result is not None and "is_busy" in result:
            self._results.pop(key, None)
            raise _overloaded_error()
        return result

    async def _run_trial(self, job: bytes) -> dict[str, Any] | None:
        try:
            reply = await self._trials.run(job)
        except BusyError as error:
            logger.warning("a grammar could not be tried: %s", error.__cause__ or "too many trials are waiting")
            return {"is_busy": True}
        result: dict[str, Any] | None = None if reply is None else json.loads(reply)
        return result


def _overloaded_error() -> GracefulHTTPError:
    return GracefulHTTPError(
        "too many structured output grammars are waiting to be checked; retry the request",
        HTTPStatus.SERVICE_UNAVAILABLE,
    )


def _make_trial(vllm_config: Any) -> Callable[[bytes], bytes]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = cached_tokenizer_from_config(model_config=vllm_config.model_config)
    settings = vllm_config.structured_outputs_config
    make = partial(_make_backend, vllm_config=vllm_config, tokenizer=tokenizer)
    names = ("xgrammar", "guidance") if settings.backend == "auto" else (settings.backend,)
    backends = {name: make(name) for name in names}

    def run(job: bytes) -> bytes:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**json.loads(job)))
        try:
            params._validate_structured_outputs(vllm_config.model_config, settings, tokenizer)
            result = params.structured_outputs
            name = result._backend
            _try_grammar(backends.get(name) or make(name), result)
        except Exception as error:  # noqa: BLE001 - any error of a parser is the request's fault
            return json.dumps({"error": f"invalid structured output: {error or type(error).__name__}"}).encode()
        constraint = {field: getattr(result, field) for field in _CONSTRAINT_FIELDS}
        return json.dumps({"constraint": constraint, "backend": name, "was_auto": result._backend_was_auto}).encode()

    return run


def _try_grammar(backend: Any, constraint: StructuredOutputsParams) -> None:
    """Compile the grammar and generate random tokens with it.

    Raises:
        ValueError: it allows no text, or takes too long per token.
    """
    grammar = Metered(backend.compile_grammar(*get_structured_output_key(constraint)))
    bitmask = backend.allocate_token_bitmask(1)
    rng = np.random.default_rng(0)
    for _ in range(_NUM_TRIAL_TOKENS):
        grammar.fill_bitmask(bitmask, 0)
        allowed = np.flatnonzero(np.unpackbits(bitmask[0].numpy().view(np.uint8), bitorder="little"))
        if not len(allowed):
            raise ValueError("no text matches the grammar")
        continuing = allowed[allowed != backend.tokenizer.eos_token_id]
        if not len(continuing) or not grammar.accept_tokens("trial", [int(rng.choice(continuing))]):
            break
    if grammar.is_exhausted:
        raise ValueError("the grammar takes too long per token; make it simpler and less ambiguous")


def _make_backend(name: str, *, vllm_config: Any, tokenizer: Any) -> Any:
    backends: dict[str, Callable[..., Any]] = {
        "xgrammar": XgrammarBackend,
        "guidance": GuidanceBackend,
        "outlines": OutlinesBackend,
        "lm-format-enforcer": LMFormatEnforcerBackend,
    }
    return backends[name](vllm_config, tokenizer=tokenizer, vocab_size=vllm_config.model_config.get_vocab_size())


class Metered:
    """Wraps a vLLM grammar, and rejects every token once its CPU time is used up."""

    def __init__(self, grammar: Any) -> None:
        self._grammar = grammar
        self._left_s = _MASK_BURST_S

    @property
    def is_exhausted(self) -> bool:
        """Whether its CPU time is used up."""
        return self._left_s < 0

    def fill_bitmask(self, bitmask: Any, idx: int) -> None:
        """Write the mask of tokens that may come next to row `idx` of `bitmask`."""
        started = time.thread_time()
        self._grammar.fill_bitmask(bitmask, idx)
        self._left_s -= time.thread_time() - started

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Advance by generated tokens. Returning False ends the request."""
        started = time.thread_time()
        is_accepted: bool = self._grammar.accept_tokens(request_id, tokens)
        self._left_s -= time.thread_time() - started
        if self.is_exhausted:
            logger.warning("ending request %s: its grammar takes too long per token", request_id)
            return False
        self._left_s = min(_MASK_BURST_S, self._left_s + len(tokens) * _MASK_S_PER_TOKEN)
        return is_accepted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grammar, name)


class GrammarManager(StructuredOutputManager):
    """vLLM's manager with one backend per request. vLLM uses the first request's backend for all, and fails requests that need
    another.
    """

    @classmethod
    def adopt(cls, manager: Any) -> Self:
        """Turn vLLM's manager into one of this class: vLLM has no hook to choose the class."""
        manager.__class__ = cls
        manager.backends = {}
        if hasattr(manager, "executor"):  # threads that xgrammar starts inherit the niceness
            manager.executor = ThreadPoolExecutor(manager.executor._max_workers, initializer=_lower_priority)
        adopted: Self = manager
        return adopted

    def grammar_init(self, request: Any) -> None:
        """Start compiling the request's grammar with its own backend."""
        if request.structured_output_request is None:
            return
        name = request.sampling_params.structured_outputs._backend
        if name not in self.backends:
            self.backends[name] = _make_backend(name, vllm_config=self.vllm_config, tokenizer=self.tokenizer)
        self.backend = self.backends[name]
        super().grammar_init(request)

    def _create_grammar(self, request: Any) -> Any:
        params = request.sampling_params
        kind, text = request.structured_output_request.structured_output_key
        backend = self.backends[params.structured_outputs._backend]
        return Metered(backend.compile_grammar(kind, text, stop_token_ids=params.all_stop_token_ids))


def _lower_priority() -> None:
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
