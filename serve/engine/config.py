"""Adapts vLLM's configuration for a population, and refuses unsupported options with the reason."""

import os
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from chorus.population import manifest
from chorus.population.checkpoint import check_mixable
from chorus.population.errors import ChorusError
from chorus.serve.engine.drafts import speculative_config, uses_drafter
from chorus.serve.engine.loader import LOAD_FORMAT
from chorus.serve.engine.parallel import fix_placement
from chorus.serve.engine.requests import install_grammar_trials, install_request_check

logger = init_logger(__name__)


class PopulationConfig(VerifyAndUpdateConfig):
    """The hook that vLLM calls for every model of our architecture, in the process that creates the configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse unsupported options, then select our scheduler, worker and loader."""
        _refuse(vllm_config)
        check_members(Path(vllm_config.model_config.model))
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # `worker` is written for the V1 runner; V2 has other hooks
        scheduler, parallel, load = vllm_config.scheduler_config, vllm_config.parallel_config, vllm_config.load_config
        scheduler.scheduler_cls = "chorus.serve.engine.scheduler.PopulationScheduler"
        scheduler.disable_hybrid_kv_cache_manager = False
        scheduler.async_scheduling = False
        parallel.worker_cls = "chorus.serve.engine.worker.PopulationWorker"
        if not current_platform.is_cpu() or not _can_compile():
            # A CUDA graph is captured for a fixed number of rows, but the members of a mixed batch run different numbers of rows.
            vllm_config.model_config.enforce_eager = True
        if load.load_format in ("auto", "hf", "safetensors"):
            load.load_format = LOAD_FORMAT
        fix_placement(vllm_config)
        if parallel.tensor_parallel_size == 1 and not vllm_config.model_config.logits_processors:
            vllm_config.speculative_config = speculative_config(vllm_config)
        install_request_check(vllm_config.model_config.model)
        install_grammar_trials()


def _can_compile() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        logger.warning("No C++ compiler found: members run eagerly, which is slower. Install g++ or set CXX.")
        return False
    return True


def _refuse(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    refusals = {
        "LoRA adapters (--enable-lora) belong to one model, but a population has several": vllm_config.lora_config is not None,
        "pipeline parallelism (--pipeline-parallel-size) is not supported, since members are whole on each rank; "
        "use --tensor-parallel-size": parallel.pipeline_parallel_size > 1,
        "decode context parallelism (--decode-context-parallel-size) is not supported": parallel.decode_context_parallel_size > 1,
        "dual-batch overlap (--enable-dbo) is not supported, since members already split the batch": parallel.enable_dbo,
        "KV transfer (--kv-transfer-config) is not supported: a request holds KV of only some members, and connectors expect all":
            vllm_config.kv_transfer_config is not None,
        "speculative decoding (--speculative-config) is built in, with members as drafters":
            vllm_config.speculative_config is not None and not uses_drafter(vllm_config.speculative_config),
    }  # fmt: skip
    for reason, applies in refusals.items():
        if applies:
            raise ChorusError(f"a population cannot be served with this configuration: {reason}.")


def check_members(directory: Path) -> None:
    """Refuse members that cannot be mixed, before any process is started for them.

    vLLM would not notice a member's sliding window: it takes the window from the population's own config, which has none.
    """
    population = manifest.load(directory)
    configs = {f"member {m.name!r}": manifest.read_config(directory / m.path) for m in population.members}
    check_mixable(configs, context_length=population.context_length)
