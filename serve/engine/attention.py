"""A member's attention layers: their KV cache is the member's own, and they see only the rows that the member runs."""

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
    """The step that is being run, shared by the worker (which sets it), the model and the attention of its members.

    None outside a step: vLLM's warm-up and profiling runs, in which every member runs every row.
    """

    step: Step | None = None
    catch_up_inputs: Mapping[int, tuple[Tensor, Tensor]] = {}
    """Token ids and positions (num_rows,) of each member that runs catch-up rows in this step."""
    is_merged: bool = False
    """Whether the attention of the first member that runs is told of the rows of all."""
    allows_unnormalised: bool = False
    """Whether logits may be given as they are: no request of the batch has penalties, which act on normalised log-probabilities."""


class MemberLayers:
    """The attention layers of one member, under names that the layers of all members share.

    Compiled code finds a layer, its metadata and its slots in vLLM's forward context by the layer's name, and members of one
    configuration share compiled code. In vLLM's own dictionaries each name is unique.
    """

    def __init__(self, model: Any, member: int, current: CurrentStep) -> None:
        """Make the attention layers of `model` those of `member`.

        Raises:
            ChorusError: a layer's KV cache is not plain full attention (sliding windows, latent attention, state spaces).
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
                f"member {member} has no attention layer that vLLM caches: only decoder-only transformers can be mixed."
            )

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def in_context(self) -> Iterator[None]:
        """Let vLLM's forward context hold this member's layers, metadata and slots under the shared names."""
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
                f"member {member}, layer {layer.layer_name}: its KV cache is a {type(spec).__name__}, and only full attention can "
                "be mixed so far. Where a sliding window is no shorter than the context, remove it from the member's config.json."
            )
        return MemberAttentionSpec.of(spec, member)

    layer.get_kv_cache_spec = get_kv_cache_spec


def _member_builder(builder: type, member: int, current: CurrentStep) -> type:
    """A subclass of a backend's metadata builder that builds for the member's rows only."""

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
    """The metadata of a batch that holds only `rows`; its slot mapping is that of these rows already."""

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
