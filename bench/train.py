"""Tokens per second of the training step, against a bare PyTorch loop over the same model: `python -m bench.train`.

Medians of alternating rounds on the same batches of one member:

    bare     PyTorch's cross-entropy over all logits, `clip_grad_norm_`, `torch.optim.Muon` for matrices and AdamW for the rest
    bare32   the same with the Newton-Schulz steps of `torch.optim.Muon` in float32: the faster of the two is the baseline
    ours     the step of `train.trajectory`, including reading the batch from disk, loss and optimiser
    taught   `ours` with a teacher
    compiled `ours` with compilation (with --compile)

Also prints the share of the machine's matrix-product rate, measured in the same run, and on known GPUs the model FLOP utilisation
against the vendor's dense bfloat16 peak. For a GPU: `--layers 12 --width 768 --heads 12 --context-length 1024
--vocab-size 8192 --batch-tokens 65536` (97M parameters).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import _muon

from chorus.train import run as runs
from chorus.train.data import Epoch, TrainTokens
from chorus.train.launch import ALLOCATOR
from chorus.train.model import Llama
from chorus.train.run import Prepared, Run
from chorus.train.settings import Settings
from chorus.train.step import autocast, micro_tokens
from chorus.train.trajectory import Trajectory
from chorus.train.worker import choose_device

BARS = {"ours": 0.9, "taught": 1 / 1.4}
# Dense bfloat16 FLOP/s from the vendor's data sheets; of several boards, the SXM one.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}
Step = Callable[[], object]


def main() -> None:
    """Time all kinds of steps in turn, then print the table."""
    arguments = _parse()
    # `chorus train` starts its processes with this allocator. The bare loop gains from it, too.
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "bench.train", *sys.argv[1:]], {**os.environ, **ALLOCATOR})
    torch.set_num_threads(arguments.threads)
    device = choose_device(0)
    with tempfile.TemporaryDirectory(prefix="chorus-bench-") as name:
        run = make_run(Path(name), arguments)
        steps = make_steps(run, device, compiled=arguments.compile)
        first_two_s = {kind: timed(step, 2, device) * 2 for kind, step in steps.items()}
        seconds: dict[str, list[float]] = {kind: [] for kind in steps}
        for _ in range(arguments.rounds):
            for kind, step in steps.items():
                seconds[kind].append(timed(step, arguments.steps, device))
    report(run, {kind: statistics.median(times) for kind, times in seconds.items()}, first_two_s, device, arguments)


def make_run(directory: Path, arguments: argparse.Namespace) -> Run:
    """A run of one member on random tokens, since the content does not change the time of a step."""
    settings = Settings(
        corpus="random tokens", layers=arguments.layers, width=arguments.width, heads=arguments.heads,
        context_length=arguments.context_length, vocab_size=arguments.vocab_size, batch_tokens=arguments.batch_tokens,
        trajectories=1, cycles=2, epochs_per_cycle=1,
    )  # fmt: skip
    length, count = settings.context_length + 1, 2 * settings.batch_tokens // settings.context_length + 4
    documents = np.random.default_rng(0).integers(arguments.vocab_size, size=(count, length), dtype=np.uint32)
    TrainTokens.save(directory / "training", [length] * count, documents)
    tokens = {"train": count * length}
    prepared = Prepared(vocab_size=arguments.vocab_size, bos=0, eos=1, tokens=tokens, documents={"train": count})
    runs.save(directory, settings, prepared)
    return Run.load(directory)


def make_steps(run: Run, device: torch.device, *, compiled: bool) -> dict[str, Step]:
    """The steps to time, by name."""
    steps: dict[str, Step] = {
        "bare": bare_step(run, device),
        "bare32": bare_step(run, device, newton_schulz=torch.float32),
        "ours": our_step(run, device),
        "taught": our_step(run, device, taught=True),
    }
    if compiled:
        changed = Run(
            directory=run.directory,
            settings=Settings(**{**vars(run.settings), "compile": True}),
            prepared=run.prepared,
        )
        steps["compiled"] = our_step(changed, device)
        steps["compiled, taught"] = our_step(changed, device, taught=True)
    return steps


def our_step(run: Run, device: torch.device, *, taught: bool = False) -> Step:
    """A training step as in a run."""
    trajectory = Trajectory(run, 0, device)
    trajectory.initialise()
    if taught:
        teacher = Llama(run.shape).to(device)
        teacher.load_state_dict(trajectory.model.state_dict())
        trajectory.step.teach([(teacher.eval().requires_grad_(False), 1.0)])
    schedule = run.schedule(0)
    rate, decay = schedule.rates(schedule.cycles()[0], 0)
    return lambda: trajectory.step(*batch(run), rate=rate, decay=decay, place="the benchmark")


def bare_step(run: Run, device: torch.device, *, newton_schulz: torch.dtype = torch.bfloat16) -> Step:
    """A step written without this project: the same model, micro-batches and precision with PyTorch's loss and optimisers."""
    model = Llama(run.shape).to(device)
    model.initialise(torch.Generator().manual_seed(0))
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if ".layers." not in n or p.ndim != 2]
    optimisers = [
        torch.optim.Muon(matrices, lr=0.015, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.015, betas=(0.9, 0.95), weight_decay=0.3),
    ]
    rows = max(1, micro_tokens(run.settings, device) // run.settings.context_length)

    def step() -> float:
        tokens_BT, targets_BT = batch(run)
        total = 0.0
        for tokens, targets in zip(tokens_BT.split(rows), targets_BT.split(rows), strict=True):
            with autocast(device):
                logits = model.lm_head(model(tokens.to(device)))
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.to(device).flatten())
            share = len(tokens) / len(tokens_BT)
            (loss * share).backward()
            total += share * loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with newton_schulz_in(newton_schulz):
            for optimiser in optimisers:
                optimiser.step()
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        return total

    return step


@contextmanager
def newton_schulz_in(dtype: torch.dtype) -> Iterator[None]:
    """Run `torch.optim.Muon` with another precision, for which it has no setting."""
    original = torch.Tensor.bfloat16
    if dtype != torch.bfloat16:
        torch.Tensor.bfloat16 = lambda self: self.to(dtype).clone()  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = original  # type: ignore[method-assign]


assert "grad.bfloat16()" in Path(_muon.__file__).read_text(encoding="utf-8"), (
    "torch.optim.Muon has changed: adapt newton_schulz_in"
)


def batch(run: Run) -> tuple[Tensor, Tensor]:
    """Read a batch from disk; every kind of step includes this."""
    data = TrainTokens(run.directory / "training")
    rows = run.schedule(0).cycles()[0].batch_rows
    epoch = Epoch(data, seed=0, trajectory=0, epoch=0)
    tokens, targets = epoch.batch(0, rows=rows, length=run.settings.context_length)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def timed(step: Step, steps: int, device: torch.device) -> float:
    """Mean seconds per step."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    return (time.perf_counter() - started) / steps


def synchronise(device: torch.device) -> None:
    """Wait for the device, if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device) -> tuple[float, str]:
    """FLOP/s of a large matrix product in the precision of a step: the best of 8 runs."""
    size = 8_192 if device.type == "cuda" else 1_024
    a = torch.randn(size, size, device=device)
    with autocast(device):
        dtype = (a @ a).dtype
    a = a.to(dtype)
    best = min(timed(lambda: a @ a, 4, device) for _ in range(8))
    return 2 * size**3 / best, str(dtype).removeprefix("torch.")


def report(
    run: Run,
    seconds: dict[str, float],
    first_two_s: dict[str, float],
    device: torch.device,
    arguments: argparse.Namespace,
) -> None:
    """Print the table."""
    shape, tokens = run.shape, run.schedule(0).cycles()[0].batch_rows * run.settings.context_length
    rate, dtype = product_rate(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {arguments.threads}"
    peak = next((value for key, value in PEAKS.items() if device.type == "cuda" and key in name), None)
    print(
        f"{name}; PyTorch {torch.__version__}; {shape.num_parameters:,} parameters ({shape.layers} layers, width {shape.width}, "
        f"vocabulary {shape.vocab_size:,}), steps of {tokens:,} tokens, context {shape.context_length:,}; medians of "
        f"{arguments.rounds} rounds of {arguments.steps} steps.\nMatrix product in {dtype}: {rate / 1e9:,.0f} GFLOP/s.\n"
    )
    print("| step | tokens/s | against the bare loop | bar | of the product rate | MFU | first two steps |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    baseline = min(seconds["bare"], seconds["bare32"])
    for kind, own in seconds.items():
        work = shape.flops_per_token * tokens * (4 / 3 if "taught" in kind else 1)
        bar = f"{BARS[kind]:.2f}x" if kind in BARS else ""
        against = f"{(seconds['ours'] if kind == 'taught' else baseline) / own:.2f}x"
        against += " of ours" if kind == "taught" else ""
        mfu = f"{work / own / peak:.1%}" if peak else "-"
        print(
            f"| {kind} | {tokens / own:,.0f} | {against} | {bar} | {work / own / rate:.0%} | {mfu} | {first_two_s[kind]:.1f} s |"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 3), ("width", 128), ("heads", 4), ("context-length", 256), ("vocab-size", 2_048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch-tokens", type=int, default=1_024)
    parser.add_argument(
        "--threads", type=int, default=1, help="of this process; in a run, trajectories share the threads"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="of each kind in a round")
    parser.add_argument("--compile", action="store_true", help="also time compiled steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
