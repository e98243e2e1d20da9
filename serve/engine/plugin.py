"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`): it makes populations servable."""

import warnings

from chorus.population.checkpoint import ARCHITECTURE

KNOWN_VLLM = "0.32."
"""Versions whose internals this package was written against and is tested with."""


def register() -> None:
    """Register the architecture, its configuration, loader and KV cache with vLLM. Calling it twice does no harm."""
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from chorus.serve.engine.config import PopulationConfig
    from chorus.serve.engine.kv import register_spec
    from chorus.serve.engine.loader import LOAD_FORMAT, PopulationLoader

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    if not vllm.__version__.startswith(KNOWN_VLLM):
        warnings.warn(
            f"chorus knows vLLM {KNOWN_VLLM}x, this is {vllm.__version__}: mixtures may fail or be wrong", stacklevel=2
        )
    ModelRegistry.register_model(ARCHITECTURE, "chorus.serve.engine.model:PopulationForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = PopulationConfig
    register_model_loader(LOAD_FORMAT)(PopulationLoader)
    register_spec()
