"""How long answers are whose requests do not say: a quantile of what such requests generated lately, tenant by tenant.

A chat without `max_tokens` may fill the context, and almost none does. Planned as if it did, it would get the smallest tier
whenever it has a time budget.
"""

from collections import OrderedDict, deque
from dataclasses import replace

from chorus.serve.gateway.request.size import Size

QUANTILE = 0.9
PRIOR_TOKENS = 512
"""What is expected where nothing is known: most answers of chat models are shorter."""
_ENOUGH = 10
"""The prior stands in for each answer that is missing to so many."""
_REMEMBERED = 200
_MOST_TENANTS = 4096


class AnswerLengths:
    """The lengths of one gateway's answers. No tenant learns from another: long answers of one would shrink others' tiers."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, deque[int]] = OrderedDict()

    def expected(self, tenant: str) -> int:
        """Tokens that nine of ten such answers stay below."""
        seen = self._seen.get(tenant, deque[int]())
        lengths = sorted([*seen, *[PRIOR_TOKENS] * (_ENOUGH - len(seen))])
        return max(1, lengths[min(len(lengths) - 1, int(QUANTILE * len(lengths)))])

    def planned(self, size: Size, tenant: str) -> Size:
        """The size to plan with: the answer as long as is expected, where the request names no length."""
        if not size.is_open:
            return size
        return replace(size, max_tokens=min(size.max_tokens, self.expected(tenant)))

    def observe(self, size: Size, tenant: str, tokens: float, *, is_cut: bool = False) -> None:
        """Learn from an answer of so many tokens in each sequence.

        One that was cut would have been longer: it counts as no less than is expected, as otherwise only short answers would teach.
        """
        if not size.is_open:
            return
        length = max(round(tokens), min(size.max_tokens, self.expected(tenant)) if is_cut else 0)
        self._seen.setdefault(tenant, deque(maxlen=_REMEMBERED)).append(length)
        self._seen.move_to_end(tenant)
        if len(self._seen) > _MOST_TENANTS:
            self._seen.popitem(last=False)
