"""Runs members of the same architecture and shape together, layer by layer, instead of one after the other.

In a small member, overhead exceeds arithmetic: each of about ten operations per layer takes microseconds before its first row. Here
norms, rotary embeddings, activations and attention run once for the rows of all members. Matrix products remain per member, on
weights as vLLM packed them, but those of small matrices become one batched product. Attention is one call per layer: layers of the
same depth share a KV cache tensor in which every block belongs to one member, so each request of each member is one sequence.

M members, N rows of all running members, one member after the other, D width
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
"""Largest matrix, in elements, for which one batched product beats one call per member: there a call costs more than its product
(bench/LOG.md). Such matrices are stored twice, since vLLM packs its own copy."""
MAX_MEAN_ROWS = 32
"""Largest mean number of rows per member for which members run together. With more, separate runs are as fast."""


class Grouped:
    """Runs any subset of the members together, each on its own rows."""

    def __init__(self, members: Mapping[int, LlamaForCausalLM], order: Sequence[int]) -> None:
        """`order` lists all members, those that run together most often first: prefixes of it run fastest."""
        self._place = {member: place for place, member in enumerate(order)}
        models = [members[member].model for member in order]
        self._embeddings = [model.embed_tokens for model in models]
        self._layers = [_Layer(layers) for layers in zip(*(model.layers for model in models), strict=True)]
        self._norm = _Norm([model.norm for model in models])
        self._rows: dict[tuple[tuple[int, ...], tuple[int, ...]], _Rows] = {}

    @classmethod
    def of(cls, members: Mapping[int, Any], order: Sequence[int]) -> Self | None:
        """A `Grouped` of these members, or None if they cannot run together.

        CPUs only: on GPUs, vLLM's kernels fuse norms, and its attention may have no room for more sequences than requests.
        """
        if not current_platform.is_cpu():
            return None
        shapes = {_shape(member) for member in members.values()}
        return cls(members, order) if len(shapes) == 1 and None not in shapes else None

    def stack(self) -> None:
        """Copy the small matrices. Call after weights are loaded and before vLLM packs them."""
        for layer in self._layers:
            layer.stack()

    def ordered(self, running: Sequence[int]) -> list[int]:
        """`running` in the order in which members run."""
        return sorted(running, key=self._place.__getitem__)

    def attention_layers(self, member: int) -> list[Any]:
        """The member's attention layers, by depth."""
        return [layer.attention[self._place[member]] for layer in self._layers]

    def __call__(self, running: Sequence[int], inputs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Hidden states of each member that runs, each (its rows, D).

        Args:
            running: the members, `ordered`. The attention metadata of the first one's layers must cover all rows, in this order.
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
    """Assigns rows to members. A member's place is its index in the order of all members."""

    places: list[int]
    """Places of the running members."""
    sizes: list[int]
    """Number of rows of each running member."""
    place_N: Tensor
    """Place of each row's member; (1,) if only one member runs."""
    rows_per_member: int | None
    """Rows of each member, if several run, all have equally many, and they are the first of the order; else None."""

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
        # Not `forward`: in an engine that compiles, vLLM expects that call to be compiled.
        queries, keys = self._rotary.forward_cpu(positions_N, queries, keys)
        hidden_ND = self._output(rows, _attend(self.attention[rows.places[0]], queries, keys, values))
        hidden_ND, residual_ND = self._norm_between(rows, hidden_ND, residual_ND)
        return self._down(rows, self._activation(self._gate_up(rows, hidden_ND))), residual_ND


class _Linear:
    """One linear layer of all members, with I inputs and O outputs each."""

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
        """Each row times its member's matrix, (N, O)."""
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
    """The output of an attention layer, bypassing two Python custom operators that matter only to compilation."""
    output_NI = torch.empty_like(queries_NI)
    context = get_forward_context()
    if not context.attn_metadata:
        return output_NI  # vLLM's profiling run, without a KV cache
    name = layer.layer_name
    heads = (-1, layer.num_heads, layer.head_size)
    keys, values = (each.view(-1, layer.num_kv_heads, layer.head_size) for each in (keys_NI, values_NI))
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, context.slot_mapping[name])
    layer.impl.forward(
        layer, queries_NI.view(heads), keys, values, layer.kv_cache, context.attn_metadata[name], output_NI.view(heads)
    )
    return output_NI


class _Norm:
    """One RMS norm of all members."""

    def __init__(self, norms: Sequence[Any]) -> None:
        self._norms = norms
        self._epsilon = norms[0].variance_epsilon
        self._weights_MD: Tensor | None = None

    def __call__(self, rows: _Rows, x_ND: Tensor, residual_ND: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum. Overwrites both arguments."""
        if self._weights_MD is None:  # on first use, because weights are loaded after the model is built
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
    """The properties that members running together must share; None if the member is not a plain, unquantised Llama."""
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
        return None  # sharded over ranks: each layer ends with an all-reduce
    config = member.config
    return (
        len(layers), config.hidden_size, config.intermediate_size, first.num_heads, first.num_kv_heads, first.head_dim,
        config.rms_norm_eps, str(getattr(config, "rope_parameters", None)), config.max_position_embeddings,
    )  # fmt: skip
