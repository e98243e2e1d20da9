"""P[m, n]: the probability that member m gives to the true token n of a text, computed once and kept on disk.

A member's row is written as soon as it is complete (`prior.matrix` says how). So an interrupted run resumes at the member it had
reached, a member added later costs only itself, and a row of other weights or another text is computed again.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from chorus.population.errors import ChorusError
from chorus.population.manifest import Member, Population
from chorus.prior.engine import Engine, engine_losses
from chorus.prior.matrix import Index, Part, RowFile
from chorus.prior.splits import ScoredSplit

DIRECTORY = Path("prior") / "likelihoods"
# A softmax gives no zeros; below this float32 would make one. It caps a token's loss at 87 nats.
SMALLEST = float(np.finfo(np.float32).tiny)
_LOGITS_BYTES = 1 << 28  # of float32 logits held at once

# M members, N scored tokens, B windows of a batch, T tokens of a window, V vocabulary
Progress = Callable[[str, str, int, int], None]
"""Called with the names of member and split, the tokens scored since the last call, and all that there are to score."""


def likelihoods(
    population: Population,
    directory: Path,
    splits: list[ScoredSplit],
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """The matrix (M, N) over the splits one after the other, read-only and memory-mapped; what is on disk is not computed.

    Members run here, or in `engine`, member by member through echoed prompts.

    Raises:
        ChorusError: a member cannot be loaded or gives undefined probabilities.
    """
    file = row_file(directory, splits)
    known = file.sound()
    missing = {weights_digest(member): member for member in population.members if weights_digest(member) not in known}
    for digest, member in missing.items():
        if engine is not None:
            rows = [_ask(engine, member, split, progress) for split in splits]
        else:
            model = load_model(directory / member.path, population)
            rows = [_compute(model, member, split, progress) for split in splits]
        file.write(digest, np.concatenate(rows))
    if missing:
        known = file.sound()
    return file.matrix([known[weights_digest(member)] for member in population.members])


def row_file(directory: Path, splits: list[ScoredSplit]) -> RowFile:
    """Where the rows of these splits are kept."""
    text = hashlib.sha256("\n".join(f"{split.name} {split.digest}" for split in splits).encode()).hexdigest()
    parts = tuple(Part(name=s.name, num_tokens=s.num_scored, offsets=s.offsets.tolist()) for s in splits)
    return RowFile.open(directory / DIRECTORY / text[:16], Index(text=text, parts=parts))


def weights_digest(member: Member) -> str:
    """One digest for all weight files of a member."""
    return hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(member.sha256.items())).encode()).hexdigest()


def load_model(checkpoint: Path, population: Population) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ChorusError(f"member {checkpoint} cannot be loaded ({error}). Restore its files.") from None
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < population.vocab_size:
        raise ChorusError(f"member {checkpoint} has {rows} output rows, the population {population.vocab_size} tokens.")
    return model.eval().to(device)


def _compute(
    model: PreTrainedModel, member: Member, split: ScoredSplit, progress: Progress | None
) -> NDArray[np.float32]:
    """Probabilities of the scored tokens, in order; windows of like length share a batch."""
    row_N = np.zeros(split.num_scored, dtype=np.float32)
    for targets_BT, logits_BTV, places in batches(model, split):
        log_p_BT = target_log_probabilities(logits_BTV, targets_BT).cpu().numpy()
        for log_p_T, (first, count) in zip(log_p_BT, places, strict=True):
            row_N[first : first + count] = np.exp(log_p_T[:count].astype(np.float64))
        if progress is not None:
            progress(member.name, split.name, sum(count for _, count in places), split.num_scored)
    return _checked(row_N, member)


def _ask(engine: Engine, member: Member, split: ScoredSplit, progress: Progress | None) -> NDArray[np.float32]:
    """The same row, from an engine."""

    def tell(count: int) -> None:
        if progress is not None:
            progress(member.name, split.name, count, split.num_scored)

    losses_N = engine_losses(engine, engine.request_member(member.name), split, progress=tell)
    return _checked(np.exp(-losses_N).astype(np.float32), member)


def _checked(row_N: NDArray[np.float32], member: Member) -> NDArray[np.float32]:
    if not np.isfinite(row_N).all():
        raise ChorusError(f"member {member.name!r} gives undefined probabilities: its weights hold NaN or infinity.")
    return np.maximum(row_N, SMALLEST)


def batches(
    model: PreTrainedModel, split: ScoredSplit, *, logits_bytes: int = _LOGITS_BYTES
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]]:
    """(targets_BT, logits_BTV, places) of every window: place (first, count) says which scored tokens a row's first columns are.

    Windows are padded on the right, which attention that looks back only never sees.
    """
    vocab_size = int(model.get_output_embeddings().weight.shape[0])
    windows = sorted(split.split.windows(split.context_length), key=lambda window: window[1] - window[2])
    position = 0
    while position < len(windows):
        longest = windows[position][2] - windows[position][1]
        size = max(1, logits_bytes // (4 * vocab_size * longest))
        batch = windows[position : position + size]
        position += size
        tokens_BT = np.zeros((len(batch), longest), dtype=np.int64)
        for row_T, (_, start, stop) in zip(tokens_BT, batch, strict=True):
            row_T[: stop - start] = split.split.tokens[start:stop]
        inputs_BT = torch.from_numpy(tokens_BT).to(model.device)
        with torch.inference_mode():
            logits_BTV = model(input_ids=inputs_BT[:, :-1], use_cache=False).logits
        places = [
            (int(split.offsets[document] + start - split.split.offsets[document]), stop - start - 1)
            for document, start, stop in batch
        ]
        yield inputs_BT[:, 1:], logits_BTV, places


def target_log_probabilities(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """log p of each target (B, T) under softmax(logits), in float32."""
    chosen_BT = logits_BTV.gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1).float()
    return chosen_BT - torch.logsumexp(logits_BTV.float(), dim=-1)
