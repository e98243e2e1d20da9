import pytest
import torch

from chorus.train import compiling
from chorus.train.compiling import Compilation

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def started_after(compilation: Compilation, *, seconds: float, steps_left: int) -> int | None:
    """The step after which compiling starts; None for never."""
    return next((step for step in range(1, 100) if compilation.should_start(seconds, steps_left - step)), None)


def test_on_a_gpu_it_starts_when_enough_steps_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    assert started_after(Compilation(None, GPU), seconds=0.2, steps_left=10_000) == 10
    assert started_after(Compilation(None, GPU), seconds=0.2, steps_left=500) is None
    assert started_after(Compilation(None, GPU), seconds=0.002, steps_left=10_000) is None
    monkeypatch.setattr(compiling, "has_compiler", lambda: False)
    assert started_after(Compilation(None, GPU), seconds=0.2, steps_left=10_000) is None


@pytest.mark.parametrize(("requested", "device"), [(None, CPU), (False, CPU), (False, GPU), (True, CPU), (True, GPU)])
def test_otherwise_it_follows_the_request_and_never_starts_by_itself_on_a_cpu(
    requested: bool | None, device: torch.device
) -> None:
    compilation = Compilation(requested, device)
    assert compilation.started is bool(requested)
    assert started_after(compilation, seconds=10.0, steps_left=10_000) is None
    assert compilation.started is bool(requested)
