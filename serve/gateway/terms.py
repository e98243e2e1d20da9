"""What a client says about time: by when the answer is wanted, what to do if that fails, and how small a tier may become."""

from dataclasses import dataclass
from typing import Literal

OnDeadline = Literal["degrade", "truncate", "fail"]
"""At the deadline: let a smaller mixture finish late, return what there is, or answer 504."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of one request. Without a budget it takes the time it takes."""

    budget_s: float | None = None
    """Seconds from the request's arrival in which the answer should be complete."""
    on_deadline: OnDeadline = "degrade"

    @property
    def stops_at_deadline(self) -> bool:
        """Whether nothing is generated after the deadline."""
        return self.budget_s is not None and self.on_deadline != "degrade"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much work a request asks for, as far as its body says."""

    num_sequences: int = 1
    """Answers that are generated side by side."""
    num_choices: int = 1
    """How many of them to each prompt."""
    num_prompts: int = 1
    prompt_tokens: int = 0
    """Of prompts given as token ids, all sequences together."""
    prompt_characters: int = 0
    """Of prompts given as text, all sequences together."""
    max_tokens: int = 16
    """Longest answer of one sequence."""
    is_open: bool = False
    """Whether that is all that the context holds, as the request names no length."""

    @property
    def total_tokens(self) -> int:
        """Tokens that may be generated in all."""
        return self.num_sequences * self.max_tokens
