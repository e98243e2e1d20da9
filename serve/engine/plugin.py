"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`) to register populations."""

from typing import Any

from chorus.population.checkpoint import ARCHITECTURE
from chorus.population.errors import ChorusError
from chorus.serve.engine.internals import KNOWN_VLLM


def register() -> None:
    """Register the architecture, its configuration, loader and KV cache spec with vLLM. Idempotent."""
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    ModelRegistry.register_model(ARCHITECTURE, "chorus.serve.engine.model:PopulationForCausalLM")
    if not vllm.__version__.startswith(KNOWN_VLLM):
        MODELS_CONFIG_MAP[ARCHITECTURE] = _refusal(vllm.__version__)
        return

    from chorus.serve.engine.config import PopulationConfig
    from chorus.serve.engine.kv import register_spec
    from chorus.serve.engine.loader import LOAD_FORMAT, PopulationLoader

    MODELS_CONFIG_MAP[ARCHITECTURE] = PopulationConfig
    register_model_loader(LOAD_FORMAT)(PopulationLoader)
    register_spec()


def _refusal(version: str) -> Any:
    """A configuration hook that refuses populations. vLLM loads this plugin for plain models too, which it does not affect."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class Refusal(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            raise ChorusError(
                f"this chorus supports vLLM {KNOWN_VLLM}x, but {version} is installed, with which mixtures could be silently "
                f"wrong. Install vllm=={KNOWN_VLLM}0, or a version of chorus that supports vLLM {version}."
            )

    return Refusal
