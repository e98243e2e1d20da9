"""Expected answer lengths of requests without a `max_tokens`: a quantile of recent lengths, per tenant.

A chat without `max_tokens` could fill the context, but almost none does. Planned for a full context, it would get the smallest tier
whenever it has a time budget.
"""

from collections import OrderedDict, deque
from dataclasses import replace

from chorus.serve.gateway.request.size import Size

QUANTILE = 0.9
PRIOR_TOKENS = 512
"""Length expected before any answer was seen; most answers of chat models are shorter."""
_MIN_ANSWERS = 10
"""With fewer answers than this, `PRIOR_TOKENS` fills in for the missing ones."""
_MAX_ANSWERS = 200
_MAX_TENANTS = 4096


class AnswerLengths:
    """Recent answer lengths of one gateway, kept per tenant: one tenant's long answers must not shrink another's tiers."""

    def __init__(self) -> None:
        self._lengths: OrderedDict[str, deque[int]] = OrderedDict()

    def expected(self, tenant: str) -> int:
        """The `QUANTILE` of the tenant's recent answer lengths, in tokens."""
        recent = self._lengths.get(tenant, deque[int]())
        lengths = sorted([*recent, *[PRIOR_TOKENS] * (_MIN_ANSWERS - len(recent))])
        return max(1, lengths[min(len(lengths) - 1, int(QUANTILE * len(lengths)))])

    def planned(self, size: Size, tenant: str) -> Size:
        """The size to plan with: if the request sets no length, its answer has the expected one."""
        if not size.is_open:
            return size
        return replace(size, max_tokens=min(size.max_tokens, self.expected(tenant)))

    def observe(self, size: Size, tenant: str, tokens: float, *, is_cut: bool = False) -> None:
        """Learn from an answer with `tokens` in each sequence.

        A cut answer would have been longer, so it counts as at least the expected length; else the estimate would be biased low.
        """
        if not size.is_open:
            return
        length = max(round(tokens), min(size.max_tokens, self.expected(tenant)) if is_cut else 0)
        self._lengths.setdefault(tenant, deque(maxlen=_MAX_ANSWERS)).append(length)
        self._lengths.move_to_end(tenant)
        if len(self._lengths) > _MAX_TENANTS:
            self._lengths.popitem(last=False)
