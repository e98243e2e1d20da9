import pytest
import torch

from chorus.train import compiling
from chorus.train.compiling import Compilation

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def begun_after(compilation: Compilation, *, seconds: float, steps_left: int) -> int | None:
    """The step after which compiling begins; None for never."""
    return next((step for step in range(1, 100) if compilation.begins(seconds, steps_left - step)), None)


def test_on_a_gpu_it_begins_when_what_is_left_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    assert begun_after(Compilation(None, GPU), seconds=0.2, steps_left=10_000) == 10
    assert begun_after(Compilation(None, GPU), seconds=0.2, steps_left=500) is None
    assert begun_after(Compilation(None, GPU), seconds=0.002, steps_left=10_000) is None
    monkeypatch.setattr(compiling, "has_compiler", lambda: False)
    assert begun_after(Compilation(None, GPU), seconds=0.2, steps_left=10_000) is None


@pytest.mark.parametrize(("wanted", "device"), [(None, CPU), (False, CPU), (False, GPU), (True, CPU), (True, GPU)])
def test_else_it_is_as_was_asked_for_and_never_on_a_cpu_by_itself(wanted: bool | None, device: torch.device) -> None:
    compilation = Compilation(wanted, device)
    assert compilation.begun is bool(wanted)
    assert begun_after(compilation, seconds=10.0, steps_left=10_000) is None
    assert compilation.begun is bool(wanted)
