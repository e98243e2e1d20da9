"""What the end of an answer teaches: the request's record, the engine's model and reserve, the lengths of answers, and drift."""

from chorus.serve.gateway.observe.drift import Sample
from chorus.serve.gateway.relay.attempt import Attempt
from chorus.serve.gateway.request.call import Kind
from chorus.serve.gateway.request.size import Usage

_WITH_PROMPT_LOGPROBS: tuple[Kind, ...] = ("completion", "chat")
"""APIs that answer with log-probabilities of the prompt, which drift is measured by."""
_SAMPLE_HEADERS = ("Content-Type", "authorization")


def note_complete(attempt: Attempt) -> None:
    """The engine's answer is complete."""
    context, call, record = attempt.context, attempt.call, attempt.context.record
    attempt.engine.breaker.note_success()
    attempt.note_tier()  # members may have left since the answer began
    record.num_drops = attempt.report.num_drops
    if call.time_budget.budget_s is not None:
        _note_deadline(attempt, attempt.counted, is_met=record.elapsed_s() <= call.time_budget.budget_s)
    _note_length(attempt, attempt.counted)
    attempt.wait.note_complete()
    if attempt.counted is not None and not attempt.wait.was_blocked:
        attempt.engine.learn(
            attempt.grant.in_flight,
            attempt.counted,
            streamed=attempt.is_stream,
            prompt_characters=0 if call.size.prompt_tokens else call.size.prompt_characters,
        )
    if call.kind in _WITH_PROMPT_LOGPROBS:
        headers = {name: value for name, value in context.headers.items() if name in _SAMPLE_HEADERS}
        context.drift.maybe_add(Sample(path=attempt.path, call=call, tier=attempt.grant.tier, headers=headers))


def note_truncated(attempt: Attempt) -> None:
    """The answer was cut at its deadline, and is returned as far as it came."""
    record = attempt.context.record
    attempt.report.is_truncated = record.is_truncated = True
    record.num_drops = attempt.report.num_drops
    attempt.note_tier()
    _note_deadline(attempt, attempt.used, is_met=record.elapsed_s() <= (attempt.call.time_budget.budget_s or 0.0))
    _note_length(attempt, attempt.used, is_cut=True)


def note_missed(attempt: Attempt) -> None:
    """The answer failed at its deadline."""
    _note_deadline(attempt, attempt.used, is_met=False)
    _note_length(attempt, attempt.used, is_cut=True)


def _note_length(attempt: Attempt, usage: Usage | None, *, is_cut: bool = False) -> None:
    """Learn how long answers are, where the request did not limit it."""
    size = attempt.call.size
    if usage is not None or is_cut:
        tokens = 0.0 if usage is None else usage.completion_tokens / size.num_sequences
        lengths = attempt.context.admission.lengths
        lengths.observe(size, attempt.context.tenant.name, tokens, is_cut=is_cut)


def _note_deadline(attempt: Attempt, usage: Usage | None, *, is_met: bool) -> None:
    attempt.context.record.is_deadline_met = is_met
    request = attempt.grant.in_flight
    # An answer that grew longer than planned says nothing about the engine.
    is_longer = usage is not None and usage.completion_tokens > request.num_sequences * request.work.max_tokens
    if attempt.grant.is_promised and not is_longer:
        kept = is_met and not attempt.report.is_truncated
        attempt.engine.reserve.observe(late=not kept)
        attempt.engine.model.observe_promise(kept=kept, probability=attempt.context.admission.limits.probability)
