"""Time, memory and scaling of fitting a prior: `python -m bench.prior [--members 480]`.

Uses synthetic snapshots: trajectories whose log-probabilities drift from cycle to cycle, so that neighbours are near-duplicates,
as in a record run of q0 (5 x 96 cycles). Prints Markdown tables for bench/LOG.md. The baseline, in the same run, is the
reference's rule: 300 full-batch AdamW steps on softmax weights, top K, renormalised.
"""

import argparse
import os
import platform
import resource
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from chorus.prior.reference import reference_weights, top_by_weight
from chorus.prior.selection import best_set, nested_path, same_tokens
from chorus.prior.weights import fit_weights, mixture_losses

NUM_TRAJECTORIES = 5
MAX_FREE_SIZE = 4  # members of a set searched without nesting; larger ones take minutes
T = TypeVar("T")


def main() -> None:
    """Measure the full problem against its bars, then halves and quarters of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=480)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--budget", type=int, default=32)
    arguments = parser.parse_args()

    before = peak_megabytes()
    p_MN = snapshots(arguments.members, arguments.tokens)
    matrix = p_MN.nbytes / 1e6
    made = peak_megabytes()
    print(f"{os.cpu_count()} cores ({platform.machine()}), numpy {np.__version__}, one process")
    print(f"{arguments.members} members x {arguments.tokens:,} tokens, float32: {matrix:.0f} MB\n")

    fit, fit_s = timed(lambda: fit_weights(p_MN, gap=1e-5))
    path, path_s = timed(lambda: nested_path(p_MN, same_tokens(arguments.tokens), arguments.budget))
    peak = peak_megabytes()
    reference_M, reference_s = timed(lambda: reference_weights(p_MN))
    print("| what | measured | bar |\n|---|--:|--:|")
    print(f"| weights of all members to a gap of 1e-5 (reached {fit.gap:.0e}) | {fit_s:.1f} s | 10 s |")
    print(f"| nested path to K = {arguments.budget} | {path_s:.1f} s | 120 s |")
    print(f"| peak memory of the process, over the matrix | {peak / matrix:.2f}x | 3x |")
    print(f"| of that, python and numpy before the matrix | {before:.0f} MB | |")
    print(f"| the reference's softmax fit, for comparison | {reference_s:.1f} s | |\n")
    assert made >= matrix

    print("| K | reference, top K renormalised | nested, refitted | difference | free set | difference |")
    print("|--:|--:|--:|--:|--:|--:|")
    for size in (k for k in (1, 2, 4, 8, 16, 32, 64) if k <= arguments.budget):
        top_M = top_by_weight(reference_M, size)
        theirs, nested = float(mixture_losses(p_MN, top_M).mean()), path[size - 1]
        row = f"| {size} | {theirs:.4f} | {nested.loss:.4f} | {nested.loss - theirs:+.4f} |"
        if size <= MAX_FREE_SIZE:
            starts = (nested.members, tuple(int(idx) for idx in np.flatnonzero(top_M)))
            free = best_set(p_MN, same_tokens(arguments.tokens), size, starts=starts)
            row += f" {free.loss:.4f} | {free.loss - theirs:+.4f} |"
        else:
            row += " | |"
        print(row, flush=True)
    print(f"| {arguments.members} | {mixture_losses(p_MN, reference_M).mean():.6f} | {fit.loss:.6f} | | | |\n")

    print("| members | tokens | weights, s | steps | path to 8, s |\n|--:|--:|--:|--:|--:|")
    for members, tokens in ((4, 1), (2, 1), (1, 1), (1, 2), (1, 4)):
        part_MN = p_MN[: arguments.members // members, : arguments.tokens // tokens]
        found, seconds = timed(lambda part=part_MN: fit_weights(part, gap=1e-5))  # type: ignore[misc]
        _, short_s = timed(lambda part=part_MN: nested_path(part, same_tokens(part.shape[1]), 8))  # type: ignore[misc]
        print(f"| {part_MN.shape[0]} | {part_MN.shape[1]:,} | {seconds:.2f} | {found.num_steps} | {short_s:.1f} |")


def snapshots(num_members: int, num_tokens: int) -> NDArray[np.float32]:
    """P[m, n] of `NUM_TRAJECTORIES` drifting trajectories. Made row by row, so that memory stays at one matrix."""
    generator = np.random.default_rng(0)
    difficulty_N = generator.gamma(2.0, 1.5, size=num_tokens).astype(np.float32)
    taste = [0.7 * generator.standard_normal(num_tokens, dtype=np.float32) for _ in range(NUM_TRAJECTORIES)]
    drift = [0.3 * generator.standard_normal(num_tokens, dtype=np.float32) for _ in range(NUM_TRAJECTORIES)]
    p_MN = np.empty((num_members, num_tokens), dtype=np.float32)
    for idx, row_N in enumerate(p_MN):
        own = idx % NUM_TRAJECTORIES
        drift[own] = 0.95 * drift[own] + 0.2 * generator.standard_normal(num_tokens, dtype=np.float32)
        untrained = 0.6 * np.exp(-6 * idx / num_members)
        row_N[:] = np.exp(-np.maximum(difficulty_N + taste[own] + drift[own] + untrained, 1e-3))
    return p_MN


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Result of `work` and its duration in seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def peak_megabytes() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
