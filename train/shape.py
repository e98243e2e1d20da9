"""The sizes of a member, and the number of parameters and operations that follow from them."""

from dataclasses import dataclass

RMS_EPSILON = 1e-5
ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a member."""

    vocab_size: int
    context_length: int
    layers: int
    width: int
    heads: int

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def feed_forward(self) -> int:
        """Width of the gated feed-forward layer: 8/3 of the model width, rounded up to a multiple of 64."""
        return -(-8 * self.width // 3 // 64) * 64

    @property
    def num_parameters(self) -> int:
        """Elements in all tensors of a member."""
        return 2 * self.vocab_size * self.width + (2 * self.layers + 1) * self.width + self._matrices

    @property
    def flops_per_token(self) -> float:
        """Multiplications and additions of a training step per token: 6 per matrix weight, plus attention."""
        attention = 6 * self.layers * self.width * self.context_length
        return 6.0 * (self._matrices + self.vocab_size * self.width) + attention

    @property
    def _matrices(self) -> int:
        return self.layers * self.width * (4 * self.width + 3 * self.feed_forward)
