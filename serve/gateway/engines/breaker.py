"""A circuit breaker: after repeated failures an engine gets no requests for a pause, then a single trial request."""

import time

_FAILURE_THRESHOLD = 3
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0


class Breaker:
    """Closed (requests pass), open (none pass until the pause is over) or half open (one trial request passes)."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = _FIRST_PAUSE_S
        self._open_until = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether fewer than `_FAILURE_THRESHOLD` requests in a row have failed."""
        return self._failures < _FAILURE_THRESHOLD

    def allows_request(self) -> bool:
        """Whether a request may be sent now."""
        return self.is_closed or time.monotonic() >= self._open_until

    def note_attempt(self) -> None:
        """A request is sent. While half open, no other request passes for another pause."""
        if not self.is_closed:
            self._open_until = time.monotonic() + self._pause_s

    def note_success(self) -> None:
        """A request was answered: close the breaker."""
        self._failures, self._pause_s = 0, _FIRST_PAUSE_S

    def note_failure(self) -> None:
        """The engine failed a request through its own fault. Each failure after `_FAILURE_THRESHOLD` doubles the pause."""
        self._failures += 1
        if self._failures == _FAILURE_THRESHOLD:
            self._open_until = time.monotonic() + self._pause_s
        elif self._failures > _FAILURE_THRESHOLD:
            self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)
            self._open_until = time.monotonic() + self._pause_s
