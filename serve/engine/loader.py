"""Loads the weights of all members, each from its own checkpoint, after verifying the checkpoints against the manifest."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from chorus.population import manifest

LOAD_FORMAT = "population"


class PopulationLoader(DefaultModelLoader):
    """vLLM's safetensors loader, for the members of a population directory."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format="safetensors"))

    def get_all_weights(self, model_config: Any, model: Any) -> Generator[tuple[str, Tensor], None, None]:
        """The weights of this rank's members, named `members.{idx}.{name}`.

        Raises:
            ChorusError: a file is missing, or differs from the one that the manifest was written for.
        """
        directory = Path(model_config.model)
        population = manifest.load(directory)
        manifest.verify(population, directory)
        for idx in model.ranks.members:
            member = population.members[idx]
            source = self.Source(
                str(directory / member.path), revision=None, prefix=f"members.{idx}.", fall_back_to_pt=False
            )
            yield from self._get_weights_iterator(source)
