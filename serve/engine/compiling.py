"""Shares compiled code between members. vLLM compiles models on CPUs, unless `--enforce-eager` is given.

Members with the same config run the same code on different weights, so only one of them is compiled. Compiling therefore takes
tens of seconds, however many members there are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from vllm.config import CompilationMode

from chorus.serve.engine.attention import MemberLayers


class Compiled:
    """The members that are compiled, and their shared code."""

    def __init__(
        self, members: Mapping[int, Any], configs: Sequence[Any], layers: Mapping[int, MemberLayers], compilation: Any
    ) -> None:
        """`configs` are those of all members; in vLLM's `compilation` config the members' layers have registered themselves."""
        self._members = members
        self._configs = [{**config.to_dict(), "_name_or_path": ""} for config in configs]
        self._compiled = set[int]()
        if compilation.mode == CompilationMode.NONE:
            return
        for idx, member in members.items():
            registered = sum(name.startswith(f"member_{idx}.") for name in compilation.static_forward_context)
            if registered == len(layers[idx]) and _wrappers(member):
                self._compiled.add(idx)
            else:  # layers other than attention, such as experts, have names of their own, which would end up in compiled code
                for wrapper in _wrappers(member):
                    wrapper.do_not_compile = True

    def __contains__(self, member: int) -> bool:
        return member in self._compiled

    def share(self, member: int) -> None:
        """After this member's first run, give its compiled code to all members with the same config."""
        for other in self._compiled - {member} if member in self._compiled else ():
            if self._configs[other] == self._configs[member]:
                for source, target in zip(
                    _wrappers(self._members[member]), _wrappers(self._members[other]), strict=True
                ):
                    if (compiled := getattr(source, "aot_compiled_fn", None)) is not None:
                        target.aot_compiled_fn = compiled


def _wrappers(member: nn.Module) -> list[Any]:
    """The submodules of a member that vLLM compiles."""
    return [module for module in member.modules() if getattr(module, "do_not_compile", True) is False]
