"""Members of one architecture and shape, run layer by layer together instead of one after the other.

What costs time in a small member is not its arithmetic but the walk through its layers: each of some ten operations per layer takes
microseconds before its first row. Here norms, rotary embeddings, activations and attention run once for the rows of all members.
Matrix products remain each member's own, with the weights as vLLM packed them; those of small matrices are one batched product.

Attention is one call per layer: all members' layers of one depth share a KV cache tensor (their groups share one pool of blocks, in
which no block is two members'), so that a request of one member is one sequence among others.

M members, N rows of all members that run, side by side in their order, D width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm import _custom_ops as kernels
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from vllm.platforms import current_platform

_MAX_STACKED_ELEMENTS = 1 << 18
"""Elements of a matrix up to which one batched product is faster than a call for each member: these spend more on the call than on
the product (bench/LOG.md). Such matrices are held twice, as vLLM packs its own."""
MAX_MEAN_ROWS = 32
"""Rows of each member, on average, up to which members run together: with more, each by itself is as fast."""


class Grouped:
    """Runs any of the members, on any rows of each."""

    def __init__(self, members: Mapping[int, LlamaForCausalLM], order: Sequence[int]) -> None:
        """`order`: all members, those that run together most often first. Sets that begin it are the fastest."""
        self._place = {member: place for place, member in enumerate(order)}
        models = [members[member].model for member in order]
        self._embeddings = [model.embed_tokens for model in models]
        self._layers = [_Layer(layers) for layers in zip(*(model.layers for model in models), strict=True)]
        self._norm = _Norm([model.norm for model in models])
        self._rows: dict[tuple[tuple[int, ...], tuple[int, ...]], _Rows] = {}

    @classmethod
    def of(cls, members: Mapping[int, Any], order: Sequence[int]) -> Self | None:
        """Of members that can be run together; None where some cannot.

        Only on CPUs. vLLM's kernels for GPUs fuse norms, and their attention may have room for no more sequences than requests.
        """
        if not current_platform.is_cpu():
            return None
        shapes = {_shape(member) for member in members.values()}
        return cls(members, order) if len(shapes) == 1 and None not in shapes else None

    def stack(self) -> None:
        """Take over weights that were just loaded, before vLLM packs them."""
        for layer in self._layers:
            layer.stack()

    def ordered(self, running: Sequence[int]) -> list[int]:
        """The members in the order in which they run."""
        return sorted(running, key=self._place.__getitem__)

    def attention_layers(self, member: int) -> list[Any]:
        """The member's attention layers, by depth."""
        return [layer.attention[self._place[member]] for layer in self._layers]

    def __call__(self, running: Sequence[int], inputs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Hidden states of each member that runs, each (its rows, D).

        Args:
            running: the members, `ordered`. The attention of the first one's layers is told of the rows of all, in their order.
            inputs: token ids and positions of each member's rows.
        """
        positions_N = _concat([positions for _, positions in inputs])
        rows = self._rows_of(running, [len(token_ids) for token_ids, _ in inputs], positions_N.device)
        hidden_ND = _concat(
            [
                F.embedding(token_ids, self._embeddings[place].weight)
                for place, (token_ids, _) in zip(rows.places, inputs, strict=True)
            ]
        )
        residual_ND: Tensor | None = None
        for layer in self._layers:
            hidden_ND, residual_ND = layer(rows, positions_N, hidden_ND, residual_ND)
        hidden_ND, _ = self._norm(rows, hidden_ND, residual_ND)
        return list(hidden_ND.split_with_sizes(rows.sizes))

    def _rows_of(self, running: Sequence[int], sizes: list[int], device: torch.device) -> "_Rows":
        key = (tuple(running), tuple(sizes))
        if (cached := self._rows.get(key)) is None:
            if len(self._rows) > 256:
                self._rows.clear()
            cached = self._rows[key] = _Rows.of([self._place[member] for member in running], sizes, device)
        return cached


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Which rows are whose."""

    places: list[int]
    """Of the members that run."""
    sizes: list[int]
    place_N: Tensor
    """Of the member of each row; (1,) if there is only one member."""
    rows_per_member: int | None
    """Rows of each of the first members in the order, if it is these that run and they have as many as each other."""

    @classmethod
    def of(cls, places: list[int], sizes: list[int], device: torch.device) -> Self:
        repeats = sizes if len(places) > 1 else [1]
        place_N = torch.repeat_interleave(torch.tensor(places), torch.tensor(repeats)).to(device)
        is_stackable = len(places) > 1 and places == list(range(len(places))) and len(set(sizes)) == 1
        return cls(places=places, sizes=sizes, place_N=place_N, rows_per_member=sizes[0] if is_stackable else None)


class _Layer:
    """One layer of all members."""

    def __init__(self, layers: Sequence[LlamaDecoderLayer]) -> None:
        attention, mlp = [layer.self_attn for layer in layers], [layer.mlp for layer in layers]
        self.attention = [each.attn for each in attention]
        self._rotary = attention[0].rotary_emb
        self._activation = mlp[0].act_fn
        self._widths = [attention[0].q_size, attention[0].kv_size, attention[0].kv_size]
        self._qkv = _Linear([each.qkv_proj for each in attention])
        self._output = _Linear([each.o_proj for each in attention])
        self._gate_up = _Linear([each.gate_up_proj for each in mlp])
        self._down = _Linear([each.down_proj for each in mlp])
        self._norm_before = _Norm([layer.input_layernorm for layer in layers])
        self._norm_between = _Norm([layer.post_attention_layernorm for layer in layers])

    def stack(self) -> None:
        for linear in (self._qkv, self._output, self._gate_up, self._down):
            linear.stack()

    def __call__(
        self, rows: _Rows, positions_N: Tensor, hidden_ND: Tensor, residual_ND: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        hidden_ND, residual_ND = self._norm_before(rows, hidden_ND, residual_ND)
        queries, keys, values = self._qkv(rows, hidden_ND).split_with_sizes(self._widths, dim=-1)
        # Not by way of `forward`: in an engine that compiles, vLLM means that to be compiled.
        queries, keys = self._rotary.forward_cpu(positions_N, queries, keys)
        hidden_ND = self._output(rows, _attend(self.attention[rows.places[0]], queries, keys, values))
        hidden_ND, residual_ND = self._norm_between(rows, hidden_ND, residual_ND)
        return self._down(rows, self._activation(self._gate_up(rows, hidden_ND))), residual_ND


class _Linear:
    """One matrix of all members, of I inputs and O outputs each."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._stacked_MIO: Tensor | None = None

    def stack(self) -> None:
        weights = [layer.weight for layer in self._layers]
        if (
            len(weights) > 1
            and weights[0].numel() <= _MAX_STACKED_ELEMENTS
            and all(layer.bias is None for layer in self._layers)
        ):
            self._stacked_MIO = torch.stack([weight.detach() for weight in weights]).transpose(1, 2)

    def __call__(self, rows: _Rows, x_NI: Tensor) -> Tensor:
        """Each row's product with its member's matrix, (N, O)."""
        if self._stacked_MIO is not None and rows.rows_per_member is not None:
            count = len(rows.places)
            return torch.bmm(x_NI.view(count, rows.rows_per_member, -1), self._stacked_MIO[:count]).flatten(0, 1)
        layers = self._layers
        if len(rows.places) == 1:
            layer = layers[rows.places[0]]
            product: Tensor = layer.quant_method.apply(layer, x_NI, layer.bias)
            return product
        parts = zip(rows.places, x_NI.split_with_sizes(rows.sizes), strict=True)
        return torch.cat(
            [layers[place].quant_method.apply(layers[place], part, layers[place].bias) for place, part in parts]
        )


def _attend(layer: Any, queries_NI: Tensor, keys_NI: Tensor, values_NI: Tensor) -> Tensor:
    """What the layer returns when it is called, without the two Python operators on the way, which exist to be compiled around."""
    output_NI = torch.empty_like(queries_NI)
    context = get_forward_context()
    if not context.attn_metadata:
        return output_NI  # vLLM's profiling run: there is no cache yet
    name = layer.layer_name
    heads = (-1, layer.num_heads, layer.head_size)
    keys, values = (each.view(-1, layer.num_kv_heads, layer.head_size) for each in (keys_NI, values_NI))
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, context.slot_mapping[name])
    layer.impl.forward(
        layer, queries_NI.view(heads), keys, values, layer.kv_cache, context.attn_metadata[name], output_NI.view(heads)
    )
    return output_NI


class _Norm:
    """RMS norms of all members."""

    def __init__(self, norms: Sequence[Any]) -> None:
        self._norms = norms
        self._epsilon = norms[0].variance_epsilon
        self._weights_MD: Tensor | None = None

    def __call__(self, rows: _Rows, x_ND: Tensor, residual_ND: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum. Both are overwritten."""
        if self._weights_MD is None:  # not before: weights are loaded after the model is built
            self._weights_MD = torch.stack([norm.weight.detach() for norm in self._norms])
        places = rows.places
        weight_D = self._weights_MD[places[0]] if len(places) == 1 else None
        if residual_ND is None:
            residual_ND = x_ND
            x_ND = torch.empty_like(x_ND)
            kernels.rms_norm(x_ND, residual_ND, weight_D, self._epsilon)
        else:
            kernels.fused_add_rms_norm(x_ND, residual_ND, weight_D, self._epsilon)
        if weight_D is None and rows.rows_per_member is not None:
            count = len(places)
            x_ND.view(count, rows.rows_per_member, -1).mul_(self._weights_MD[:count].unsqueeze(1))
        elif weight_D is None:
            x_ND.mul_(self._weights_MD[rows.place_N])
        return x_ND, residual_ND


def _concat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _shape(member: Any) -> tuple[Any, ...] | None:
    """What members that run together agree on; None of one that cannot, as its layers are not the plain ones."""
    if type(member) is not LlamaForCausalLM or member.model.quant_config is not None:
        return None
    layers = list(member.model.layers)
    kinds: dict[str, type[nn.Module]] = {"self_attn": LlamaAttention, "mlp": LlamaMLP}
    if any(type(layer) is not LlamaDecoderLayer for layer in layers):
        return None
    if any(type(getattr(layer, name)) is not kind for layer in layers for name, kind in kinds.items()):
        return None
    first = layers[0].self_attn
    if first.total_num_heads != first.num_heads:
        return None  # sharded over ranks: each layer ends with a sum over them
    config = member.config
    return (
        len(layers), config.hidden_size, config.intermediate_size, first.num_heads, first.num_kv_heads, first.head_dim,
        config.rms_norm_eps, str(getattr(config, "rope_parameters", None)), config.max_position_embeddings,
    )  # fmt: skip
