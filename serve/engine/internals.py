"""All non-public parts of vLLM that this package overrides, calls or copies, with their parameters.

`differences` compares the table with vLLM's source, so that a new version can be checked before it is installed:

    python -m chorus.serve.engine.internals PATH/TO/vllm
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

KNOWN_VLLM = "0.32."
"""Prefix of the vLLM versions that this package was written for and is tested with."""
PARAMETERS: dict[str, dict[str, str]] = {
    "v1.core.sched.scheduler": {
        "Scheduler.add_request": "self, request",
        "Scheduler.schedule": "self, throttle_prefills",
        "Scheduler.update_from_output": "self, scheduler_output, model_runner_output",
        "Scheduler.make_stats": (
            "self, spec_decoding_stats, kv_connector_stats, cudagraph_stats, perf_stats, ec_connector_stats"
        ),
        "Scheduler._get_local_prefix_cache_hit": "self, request",
        "Scheduler._free_request": "self, request, delay_free_blocks",
        "Scheduler._free_blocks": "self, request",
        "Scheduler.update_draft_token_ids": "self, draft_token_ids",
    },
    "v1.core.kv_cache_coordinator": {
        "KVCacheCoordinator.find_longest_cache_hit": "self, block_hashes, max_cache_hit_length",
        "KVCacheCoordinator.get_num_blocks_to_allocate": (
            "self, request_id, num_tokens, new_computed_blocks, num_encoder_tokens, total_computed_tokens, "
            "num_local_computed_tokens, num_tokens_main_model, apply_admission_cap, prefill_end"
        ),
        "KVCacheCoordinator.allocate_new_computed_blocks": (
            "self, request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens, "
            "skip_zeroing_group_ids"
        ),
        "KVCacheCoordinator.allocate_new_blocks": (
            "self, request_id, num_tokens, num_tokens_main_model, num_encoder_tokens"
        ),
        "KVCacheCoordinator.cache_blocks": "self, request, num_computed_tokens",
        "KVCacheCoordinator.free": "self, request_id",
        "KVCacheCoordinator.pop_blocks_for_free": "self, request_id",
        "KVCacheCoordinator.remove_skipped_blocks": "self, request_id, processed_computed_tokens, num_prompt_tokens",
        "KVCacheCoordinator.new_step_starts": "self",
        "KVCacheCoordinator.get_num_cacheable_tokens": "self, num_computed_tokens, kv_cache_group_id",
        "replay_boundaries": "num_prompt_tokens, scheduler_block_size, use_eagle",
    },
    "v1.core.kv_cache_manager": {
        "KVCacheBlocks.get_block_ids": "self, allow_none, *, group_ids",
    },
    "v1.core.single_type_kv_cache_manager": {
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate": (
            "self, request_id, num_tokens, new_computed_blocks, total_computed_tokens, "
            "num_local_computed_tokens, num_tokens_main_model, apply_admission_cap, prefill_end"
        ),
        "SingleTypeKVCacheManager.add_local_computed_blocks": (
            "self, request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens"
        ),
        "SingleTypeKVCacheManager.allocate_new_blocks": "self, request_id, num_tokens, num_tokens_main_model",
        "SingleTypeKVCacheManager.cache_blocks": (
            "self, request, num_tokens, retention_interval, *, replay_boundaries"
        ),
        "SingleTypeKVCacheManager.free": "self, request_id",
        "SingleTypeKVCacheManager.pop_blocks_for_free": "self, request_id",
        "FullAttentionManager.find_longest_cache_hit": (
            "cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, drop_eagle_block, "
            "alignment_tokens, dcp_world_size, pcp_world_size"
        ),
    },
    "v1.kv_cache_interface": {
        "FullAttentionSpec.merge": "cls, specs",
        "KVCacheSpec.is_uniform_with_collection": "self, kv_cache_specs",
    },
    "v1.kv_cache_spec_registry": {
        "KVCacheSpecRegistry._ensure_registered": "cls, vllm_config",
        "KVCacheSpecRegistry.register": "cls, kvcache_spec_cls, manager_class, uniform_type_base_spec",
    },
    "v1.worker.gpu_model_runner": {
        "GPUModelRunner._update_states": "self, scheduler_output",
        "GPUModelRunner._prepare_inputs": "self, scheduler_output, num_scheduled_tokens",
        "GPUModelRunner._get_slot_mappings": (
            "self, num_tokens_padded, num_reqs_padded, num_tokens_unpadded, ubatch_slices"
        ),
        "GPUModelRunner._build_attention_metadata": (
            "self, num_tokens, num_reqs, max_query_len, num_tokens_padded, num_reqs_padded, ubatch_slices, "
            "logits_indices, max_num_sampled_tokens, use_spec_decode, for_cudagraph_capture, "
            "num_scheduled_tokens, slot_mappings"
        ),
        "GPUModelRunner._model_forward": (
            "self, input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs"
        ),
        "GPUModelRunner._input_fits_in_drafter": "self, common_attn_metadata",
        "GPUModelRunner.propose_draft_token_ids": (
            "self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, sample_hidden_states, "
            "aux_hidden_states, spec_decode_metadata, common_attn_metadata, slot_mappings"
        ),
        "GPUModelRunner._get_spec_decode_draft_probs": "self, spec_decode_metadata",
        "GPUModelRunner.sample_tokens": "self, grammar_output",
    },
    "v1.worker.cpu_worker": {
        "CPUWorker.init_device": "self",
    },
    "v1.worker.gpu_worker": {
        "Worker.init_device": "self",
    },
    "v1.engine.input_processor": {
        "InputProcessor._validate_params": "self, params, supported_tasks",
    },
    "v1.engine.async_llm": {
        "AsyncLLM.__init__": (
            "self, vllm_config, executor_class, log_stats, usage_context, mm_registry, log_requests, "
            "start_engine_loop, stat_loggers, aggregate_engine_logging, client_addresses, client_count, "
            "client_index, profiler"
        ),
        "AsyncLLM.add_request": (
            "self, request_id, prompt, params, arrival_time, lora_request, tokenization_kwargs, trace_headers, "
            "priority, data_parallel_rank, session_id, prompt_text, reasoning_ended, reasoning_parser_kwargs, "
            "kv_hints"
        ),
    },
    "sampling_params": {
        "SamplingParams._validate_structured_outputs": "self, model_config, structured_outputs_config, tokenizer",
        "check_json_nesting": "spec, *, structural_tag",
    },
    "v1.structured_output.backend_xgrammar": {
        "validate_xgrammar_grammar": "sampling_params",
    },
    "v1.structured_output": {
        "StructuredOutputManager.__init__": "self, vllm_config",
        "StructuredOutputManager.grammar_init": "self, request",
        "StructuredOutputManager.grammar_bitmask": (
            "self, requests, structured_output_request_ids, scheduled_spec_decode_tokens"
        ),
        "StructuredOutputManager._create_grammar": "self, request",
        "StructuredOutputManager.accept_tokens": "self, request, new_token_ids",
    },
    "v1.structured_output.request": {
        "get_structured_output_key": "params",
    },
    "distributed.parallel_state": {
        "init_model_parallel_group": (
            "group_ranks, local_rank, backend, use_message_queue_broadcaster, group_name, "
            "use_device_communicator, use_all2all"
        ),
    },
    "v1.sample.ops.topk_topp_sampler": {
        "apply_top_k_top_p": "logits, k, p",
        "random_sample": "probs, generators, use_fp64_gumbel",
    },
    "v1.sample.logits_processor": {
        "build_logitsprocs": "vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs",
    },
    "forward_context": {
        "set_forward_context": (
            "attn_metadata, vllm_config, num_tokens, num_tokens_across_dp, cudagraph_runtime_mode, "
            "batch_descriptor, ubatch_slices, slot_mapping, skip_compiled, is_padding"
        ),
    },
    "v1.attention.backend": {
        "subclass_attention_backend": "name_prefix, attention_backend_cls, builder_cls",
        "AttentionMetadataBuilder.build": "self, common_prefix_len, common_attn_metadata, fast_build",
    },
    "_custom_ops": {
        "rms_norm": "out, input, weight, epsilon",
        "fused_add_rms_norm": "input, residual, weight, epsilon",
    },
    "compilation.wrapper": {
        "TorchCompileWithNoGuardsWrapper.aot_compile": "self, *args, **kwargs",
    },
    "model_executor.layers.rotary_embedding.base": {
        "RotaryEmbedding.forward_cpu": "self, positions, query, key",
    },
    "model_executor.layers.attention.attention": {
        "Attention.forward": "self, query, key, value, output_shape, output_dtype",
        "get_attention_context": "layer_name",
    },
    "v1.attention.backends.cpu_attn": {
        "CPUAttentionBackendImpl.forward": (
            "self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale"
        ),
        "CPUAttentionBackendImpl.do_kv_cache_update": "self, layer, key, value, kv_cache, slot_mapping",
    },
    "model_executor.layers.linear": {
        "UnquantizedLinearMethod.apply": "self, layer, x, bias",
    },
    "v1.spec_decode.custom_class_proposer": {
        "create_custom_proposer": "vllm_config",
    },
    "model_executor.models.llama": {
        "LlamaModel.forward": "self, input_ids, positions, intermediate_tensors, inputs_embeds, **extra_layer_kwargs",
        "LlamaDecoderLayer.forward": "self, positions, hidden_states, residual",
        "LlamaAttention.forward": "self, positions, hidden_states",
        "LlamaMLP.forward": "self, x",
    },
    "model_executor.models.utils": {
        "init_vllm_registered_model": "vllm_config, *, prefix, hf_config, architectures",
    },
    "v1.metrics.loggers": {
        "StatLoggerBase.__init__": "self, vllm_config, engine_index",
        "StatLoggerBase.record": "self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx",
    },
    "model_executor.model_loader.default_loader": {
        "DefaultModelLoader.get_all_weights": "self, model_config, model",
        "DefaultModelLoader._get_weights_iterator": "self, source",
    },
}
"""Parameters by module below `vllm`, then by qualified name. Overrides must accept them and calls must pass them. `grouped`
reimplements the forward passes of Llama's modules."""


def differences(source: Path) -> Iterator[str]:
    """One line for each entry of `PARAMETERS` that differs from the vLLM package in the directory `source`."""
    for module, functions in PARAMETERS.items():
        path = source.joinpath(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.is_file():
            yield f"{module}: module not found"
            continue
        tree = ast.parse(file.read_text())
        for name, expected in functions.items():
            found = _parameters(tree, name)
            if found != expected:
                is_missing = found is None
                yield f"{module}.{name}: {'not found' if is_missing else f'found ({found}), expected ({expected})'}"


def _parameters(tree: ast.Module, name: str) -> str | None:
    body = tree.body
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        named = [node for node in body if isinstance(node, kinds) and node.name == part]
        if not named:
            return None
        body = named[-1].body
    last = named[-1]
    if isinstance(last, ast.ClassDef):
        return None
    given = last.args
    names = [each.arg for each in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else ["*"] if given.kwonlyargs else []
    names += [each.arg for each in given.kwonlyargs]
    return ", ".join([*names, f"**{given.kwarg.arg}"] if given.kwarg else names)


if __name__ == "__main__":
    found = list(differences(Path(sys.argv[1])))
    print("\n".join(found) or "no differences")
    sys.exit(bool(found))
