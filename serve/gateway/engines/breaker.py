"""A circuit breaker: an engine that fails one request after the other gets none for a while, then one to try."""

import time

_FAILURES = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Breaker:
    """Closed (requests pass), open (none do until a pause is over), or half open (one may try)."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = _FIRST_PAUSE_S
        self._open_until = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether all is well."""
        return self._failures < _FAILURES

    def lets_pass(self) -> bool:
        """Whether a request may go now."""
        return self.is_closed or time.monotonic() >= self._open_until

    def note_try(self) -> None:
        """A request goes: while half open, no other does for as long as the pause was."""
        if not self.is_closed:
            self._open_until = time.monotonic() + self._pause_s

    def note_success(self) -> None:
        """A request was answered."""
        self._failures, self._pause_s = 0, _FIRST_PAUSE_S

    def note_failure(self) -> None:
        """The engine failed a request by its own fault."""
        self._failures += 1
        if self._failures == _FAILURES:
            self._open_until = time.monotonic() + self._pause_s
        elif self._failures > _FAILURES:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._open_until = time.monotonic() + self._pause_s
