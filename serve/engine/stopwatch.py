"""Measures the seconds spent in each member and in mixing, on the clock of the device that does the work."""

import time
from typing import Any

import torch

MIXING = -1
"""The account of mixing; a member's account is its index."""


class Stopwatch:
    """Sums seconds by account. On a GPU it records events in the stream and reads them later, to avoid synchronising."""

    def __init__(self, num_members: int, device: torch.device) -> None:
        self._seconds = [0.0] * (num_members + 1)
        self._device = device
        self._is_cpu = device.type == "cpu"
        self._spans: list[tuple[int, Any, Any, float]] = []

    def mark(self) -> Any:
        """The current time, as a start for `add`."""
        if self._is_cpu:
            return time.perf_counter()
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event

    def add(self, account: int, since: Any, *, share: float = 1.0) -> None:
        """Add `share` times the time since a mark to an account; a negative share subtracts."""
        now = self.mark()
        if self._is_cpu:
            self._seconds[account] += share * (now - since)
        else:
            self._spans.append((account, since, now, share))

    def take(self) -> list[float]:
        """Seconds since the last call, of each member and then of mixing. Call it when the device has finished the step."""
        for account, start, stop, share in self._spans:
            self._seconds[account] += share * start.elapsed_time(stop) / 1000
        self._spans.clear()
        taken, self._seconds = self._seconds, [0.0] * len(self._seconds)
        return taken
