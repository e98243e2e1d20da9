"""Computes and caches P[m, n], the probability that member m gives to the true token n of a text.

Each member's row is written once complete (see `prior.matrix`). An interrupted run therefore resumes at the first member without
a row, and a member added later costs only its own row. Rows of other weights or another text are not reused.
"""

import hashlib
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

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
# Float32 underflows to 0 below this, although a softmax is never 0. It caps a token's loss at 87 nats.
MIN_PROBABILITY = float(np.finfo(np.float32).tiny)
_LOGITS_BYTES = 1 << 28  # of float32 logits held at a time

# M members, N scored tokens, B windows of a batch, T tokens of a window, S scored tokens of a batch, R of these, V vocabulary
Progress = Callable[[str, str, int, int], None]
"""Called with the names of member and split, the tokens scored since the last call, and the total to score."""


def likelihoods(
    population: Population,
    directory: Path,
    splits: list[ScoredSplit],
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """The matrix (M, N) over the concatenated splits, read-only and memory-mapped. Computes only the rows that are not on disk.

    Members run in this process or, through echoed prompts, in `engine`; one member at a time.

    Raises:
        ChorusError: a member cannot be loaded or gives undefined probabilities.
    """
    file = row_file(directory, splits)
    valid = file.valid_rows()
    missing = {weights_digest(member): member for member in population.members if weights_digest(member) not in valid}
    for digest, member in missing.items():
        if engine is not None:
            rows = [_engine_row(engine, member, split, progress) for split in splits]
        else:
            model = load_model(directory / member.path, population)
            rows = [_model_row(model, member, split, population, progress) for split in splits]
        file.write(digest, np.concatenate(rows))
    if missing:
        valid = file.valid_rows()
    return file.matrix([valid[weights_digest(member)] for member in population.members])


def row_file(directory: Path, splits: list[ScoredSplit]) -> RowFile:
    """The file that caches the rows of these splits."""
    text = hashlib.sha256("\n".join(f"{split.name} {split.digest}" for split in splits).encode()).hexdigest()
    parts = tuple(Part(name=s.name, num_tokens=s.num_scored, offsets=s.offsets.tolist()) for s in splits)
    return RowFile.open(directory / DIRECTORY / text[:16], Index(text=text, parts=parts))


def weights_digest(member: Member) -> str:
    """One SHA-256 over the digests of all weight files of a member."""
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
        raise ChorusError(
            f"member {checkpoint} has {rows} output rows, but the population's vocabulary has {population.vocab_size} tokens."
        )
    return model.eval().to(device)


def _model_row(
    model: PreTrainedModel, member: Member, split: ScoredSplit, population: Population, progress: Progress | None
) -> NDArray[np.float32]:
    """Probabilities of the scored tokens, in order."""
    row_N = np.zeros(split.num_scored, dtype=np.float32)
    for columns_R, targets_R, logits_RV in logits(model, split, rows=_LOGITS_BYTES // (4 * population.vocab_size)):
        row_N[columns_R] = np.exp(target_log_probabilities(logits_RV, targets_R).cpu().numpy().astype(np.float64))
        if progress is not None:
            progress(member.name, split.name, len(columns_R), split.num_scored)
    return _checked(row_N, member)


def _engine_row(engine: Engine, member: Member, split: ScoredSplit, progress: Progress | None) -> NDArray[np.float32]:
    """The same row, computed by an engine."""

    def advance(count: int) -> None:
        if progress is not None:
            progress(member.name, split.name, count, split.num_scored)

    losses_N = engine_losses(engine, engine.request_member(member.name), split, progress=advance)
    return _checked(np.exp(-losses_N).astype(np.float32), member)


def _checked(row_N: NDArray[np.float32], member: Member) -> NDArray[np.float32]:
    if not np.isfinite(row_N).all():
        raise ChorusError(f"member {member.name!r} gives undefined probabilities: its weights contain NaN or infinity.")
    return np.maximum(row_N, MIN_PROBABILITY)


def logits(
    model: PreTrainedModel, split: ScoredSplit, *, rows: int
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor, torch.Tensor]]:
    """Yield (columns_R, targets_R, logits_RV) for all scored tokens: their indices, their ids and the logits that predict them.

    R is at most max(`rows`, 1). Windows of similar length share a batch of at most `rows` tokens; the logits of a longer window are
    computed in pieces. Windows are padded on the right, which causal attention never sees.
    """
    rows = max(1, rows)
    split_model = _SplitModel(model)
    windows = sorted(split.windows, key=lambda window: window[0] - window[1])
    position = 0
    while position < len(windows):
        longest = windows[position][1] - windows[position][0]
        batch = windows[position : position + max(1, rows // longest)]
        position += len(batch)
        tokens_BT = np.zeros((len(batch), longest), dtype=np.int64)
        columns_BT = np.full((len(batch), longest), -1, dtype=np.int64)
        for idx, (start, stop) in enumerate(batch):
            tokens_BT[idx, : stop - start] = split.split.tokens[start:stop]
            columns_BT[idx, 1 : stop - start] = split.columns[start + 1 : stop]
        columns_BT = columns_BT[:, 1:]
        columns_S = columns_BT[columns_BT >= 0]
        inputs_BT = torch.from_numpy(tokens_BT).to(model.device)
        is_scored_BT = torch.from_numpy(columns_BT >= 0).to(model.device)
        targets_S = inputs_BT[:, 1:][is_scored_BT]
        pieces = split_model.logits(inputs_BT[:, :-1], is_scored_BT, rows)
        for start, logits_RV in zip(range(0, len(columns_S), rows), pieces, strict=True):
            yield columns_S[start : start + rows], targets_S[start : start + rows], logits_RV


class _SplitModel:
    """Runs a model's decoder and output layer separately: all logits of a long window can take tens of gigabytes.

    The second step calls the model's own forward with the decoder replaced by its cached output at some positions. This keeps
    whatever the model does after its output layer (soft caps, scales). Models for which this gives other logits run in one step.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder: Any = model.get_decoder()
        self._probe = torch.zeros((1, 3), dtype=torch.long, device=model.device)
        self._can_split = self._decoder is not model and self._split_matches_whole()

    @torch.inference_mode()
    def _split_matches_whole(self) -> bool:
        expected_TV = self._model(input_ids=self._probe, use_cache=False).logits[0]
        try:
            found_TV = self._output_logits(self._decode(self._probe), slice(1, 3))
        except (AttributeError, TypeError):
            return False
        return found_TV.shape == expected_TV[1:].shape and torch.allclose(
            found_TV, expected_TV[1:], atol=1e-3, equal_nan=True
        )

    def logits(self, inputs_BT: torch.Tensor, is_scored_BT: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
        """Yield logits (R, V) of the positions where `is_scored_BT`, at most `rows` at a time."""
        with torch.inference_mode():
            if not self._can_split:
                yield from self._model(input_ids=inputs_BT, use_cache=False).logits[is_scored_BT].split(rows)
                return
            output = self._decode(inputs_BT)
            output.last_hidden_state = output.last_hidden_state[is_scored_BT][None]
        for start in range(0, output.last_hidden_state.shape[1], rows):
            with torch.inference_mode():
                logits_RV = self._output_logits(output, slice(start, start + rows))
            yield logits_RV

    def _decode(self, inputs_BT: torch.Tensor) -> Any:
        return self._decoder(input_ids=inputs_BT, use_cache=False)

    def _output_logits(self, output: Any, positions: slice) -> torch.Tensor:
        piece = copy(output)
        piece.last_hidden_state = output.last_hidden_state[:, positions]
        self._decoder.forward = lambda *args, **kwargs: piece
        try:
            logits_RV: torch.Tensor = self._model(input_ids=self._probe, use_cache=False).logits[0]
        finally:
            del self._decoder.forward
        return logits_RV


def target_log_probabilities(logits_RV: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    """log p of each target (R) under softmax(logits), in float32."""
    chosen_R = logits_RV.gather(-1, targets_R.unsqueeze(-1)).squeeze(-1).float()
    return chosen_R - torch.logsumexp(logits_RV.float(), dim=-1)
