"""Gives each member's attention layers their own KV cache, and limits them to the rows that the member runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata, subclass_attention_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from chorus.population.errors import ChorusError
from chorus.serve.engine.kv import MemberAttentionSpec
from chorus.serve.engine.rows import MemberRows, Step


class CurrentStep(SimpleNamespace):
    """The current step. The worker sets it; the model and its members' attention layers read it."""

    step: Step | None = None
    """None in vLLM's warm-up and profiling runs, in which every member runs every row."""
    catch_up_inputs: Mapping[int, tuple[Tensor, Tensor]] = {}
    """For each member with catch-up rows in this step: the token ids and positions (num_rows,) of all its rows."""
    is_merged: bool = False
    """Whether the first running member's attention layers process the rows of all running members."""
    allows_unnormalised: bool = False
    """Whether logits may be left unnormalised: no request in the batch has penalties, which need normalised log-probabilities."""


class MemberLayers:
    """The attention layers of one member, under names shared by all members.

    Compiled code finds a layer, its metadata and its slots in vLLM's forward context by the layer's name, and members with the
    same config share compiled code. In vLLM's own dictionaries each name stays unique.
    """

    def __init__(self, model: Any, member: int, current: CurrentStep) -> None:
        """Assign the attention layers of `model` to `member`.

        Raises:
            ChorusError: a layer does not use plain full attention (but a sliding window, latent attention or a state space), or
                there are no attention layers.
        """
        backends: dict[type, type] = {}
        self._layers: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._all_layers: dict[str, Any] | None = None
        for layer in model.modules():
            if not isinstance(layer, Attention):
                continue
            backend = layer.attn_backend
            if backend not in backends:
                builder = _member_builder(backend.get_builder_cls(), member, current)
                backends[backend] = subclass_attention_backend(f"Member{member}", backend, builder)
            layer.attn_backend = backends[backend]
            _set_member_spec(layer, member)
            unique = layer.layer_name
            layer.layer_name = unique.removeprefix(f"member_{member}.")
            self._layers[layer.layer_name] = layer
            self._names[layer.layer_name] = unique
        if not self._layers:
            raise ChorusError(
                f"member {member} has no attention layers with a KV cache; only decoder-only transformers can be mixed."
            )

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def in_context(self) -> Iterator[None]:
        """Put this member's layers, metadata and slots into vLLM's forward context under the shared names."""
        context = get_forward_context()
        saved = context.no_compile_layers, context.attn_metadata, context.slot_mapping
        if self._all_layers is None:
            self._all_layers = {**context.no_compile_layers, **self._layers}
        context.no_compile_layers = self._all_layers
        context.attn_metadata, context.slot_mapping = self._renamed(saved[1]), self._renamed(saved[2])
        try:
            yield
        finally:
            context.no_compile_layers, context.attn_metadata, context.slot_mapping = saved

    def _renamed(self, by_name: Any) -> Any:
        return {shared: by_name[unique] for shared, unique in self._names.items()} if by_name else by_name


def _set_member_spec(layer: Any, member: int) -> None:
    original_get_spec = layer.get_kv_cache_spec

    def get_kv_cache_spec(vllm_config: Any) -> MemberAttentionSpec:
        spec = original_get_spec(vllm_config)
        if type(spec) is not FullAttentionSpec:
            raise ChorusError(
                f"member {member}, layer {layer.layer_name}: its KV cache is a {type(spec).__name__}; only full attention is "
                "supported. If the sliding window is at least as long as the context, remove it from the member's config.json."
            )
        return MemberAttentionSpec.of(spec, member)

    layer.get_kv_cache_spec = get_kv_cache_spec


def _member_builder(builder: type, member: int, current: CurrentStep) -> type:
    """A subclass of a backend's metadata builder that covers only the member's rows."""

    class Narrowed(builder):
        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            rows = None if current.step is None else current.step.rows[member]
            if rows is not None:
                positions = common_attn_metadata.positions
                if positions is not None:
                    inputs = current.catch_up_inputs.get(member)
                    positions = positions[rows.tokens] if inputs is None else inputs[1]
                common_attn_metadata = narrow(common_attn_metadata, rows, positions)
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    Narrowed.__name__ = f"Member{member}{builder.__name__}"
    return Narrowed


def narrow(
    metadata: CommonAttentionMetadata, rows: MemberRows, positions: Tensor | None = None
) -> CommonAttentionMetadata:
    """`metadata` reduced to `rows`. Its slot mapping must already be that of these rows."""

    def select(values: Any) -> Any:
        return None if values is None else values[rows.requests.to(values.device)]

    return metadata.replace(
        query_start_loc=rows.query_start_loc,
        query_start_loc_cpu=rows.query_start_loc_cpu,
        num_reqs=rows.num_requests,
        num_actual_tokens=rows.num_rows,
        max_query_len=rows.max_query_len,
        seq_lens=metadata.seq_lens[rows.requests],
        block_table_tensor=metadata.block_table_tensor[rows.requests],
        positions=positions,
        is_prefilling=select(metadata.is_prefilling),
        seq_lens_cpu_upper_bound=select(metadata.seq_lens_cpu_upper_bound),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
