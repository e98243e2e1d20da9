"""A lean Llama for training, with the outputs and parameter names of `transformers.LlamaForCausalLM` but not its overhead.

It has the forward pass and the initialisation. `train.snapshot` writes the files, which serving reads as plain Hugging Face
checkpoints, so only `train` uses this class. `tests/train/test_model.py` checks that it equals the original.
"""

# B rows, T positions, D width, H heads, E head size, F feed-forward width, V vocabulary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chorus.train.shape import RMS_EPSILON, ROPE_THETA, Shape


class Llama(nn.Module):
    """Decoder-only Llama with untied embeddings; `forward` ends before the output head (see `train.loss`)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = _Body(shape)
        self.lm_head = nn.Linear(shape.width, shape.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D) after the final norm."""
        hidden_BTD: Tensor = self.model(tokens_BT)
        return hidden_BTD

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the weights: embeddings and head from N(0, 0.02²), so that the first loss is about ln V, and matrices with variance
        1 / (number of inputs). Matrices that write into the residual stream are divided by the square root of their number (GPT-2).

        Weights are drawn on the CPU, so that a trajectory starts the same way on every device.
        """
        depth = (2 * self.shape.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            std = 0.02
            if "layers" in name:
                std = parameter.shape[1] ** -0.5
                std /= depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))


class _Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = _Norm(shape.width)
        inverse_E = ROPE_THETA ** -(torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size)
        angle_TE = torch.outer(torch.arange(shape.context_length, dtype=torch.float32), inverse_E).repeat(1, 2)
        self.register_buffer("cos_TE", angle_TE.cos(), persistent=False)
        self.register_buffer("sin_TE", angle_TE.sin(), persistent=False)
        self.cos_TE: Tensor
        self.sin_TE: Tensor

    def forward(self, tokens_BT: Tensor) -> Tensor:
        length = tokens_BT.shape[1]
        x_BTD: Tensor = self.embed_tokens(tokens_BT)
        rotation = self.cos_TE[:length], self.sin_TE[:length]
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation)
        normed_BTD: Tensor = self.norm(x_BTD)
        return normed_BTD


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _FeedForward(shape)
        self.input_layernorm = _Norm(shape.width)
        self.post_attention_layernorm = _Norm(shape.width)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation)
        summed_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return summed_BTD


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q_BHTE, k_BHTE, v_BHTE = (
            projection(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed_BHTE = F.scaled_dot_product_attention(
            _rotate(q_BHTE, rotation), _rotate(k_BHTE, rotation), v_BHTE, is_causal=True
        )
        out_BTD: Tensor = self.o_proj(mixed_BHTE.transpose(1, 2).flatten(2))
        return out_BTD


class _FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.down_proj = nn.Linear(shape.feed_forward, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out_BTD


class _Norm(nn.Module):
    """Root-mean-square norm, always computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD.float(), self.weight.shape, self.weight, RMS_EPSILON).to(x_BTD.dtype)


def _rotate(x_BHTE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding in the half-split layout of Hugging Face's Llama."""
    cos_TE, sin_TE = rotation
    low, high = x_BHTE.chunk(2, dim=-1)
    return (x_BHTE * cos_TE + torch.cat((-high, low), dim=-1) * sin_TE).to(x_BHTE.dtype)
