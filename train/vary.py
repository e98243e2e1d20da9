"""Parses `--vary NAME=VALUE,VALUE,...`, the settings that vary between trajectories."""

from typing import get_type_hints

from pydantic import TypeAdapter, ValidationError

from chorus.population.errors import ChorusError
from chorus.train.settings import VARIABLE, Settings

Variations = dict[str, tuple[float | int | str, ...]]


def parse_variations(texts: tuple[str, ...]) -> Variations:
    """Parse texts such as `("lr=0.01,0.02", "distil-after=1,saturation")` to values by setting. `Settings` checks the values.

    Raises:
        ChorusError: a setting cannot vary or is set twice, or a value has the wrong type.
    """
    found: Variations = {}
    for text in texts:
        flag, _, values = text.partition("=")
        name = flag.strip().removeprefix("--").replace("-", "_")
        if name not in VARIABLE:
            possible = ", ".join(known.replace("_", "-") for known in VARIABLE)
            raise ChorusError(f"--vary {text!r}: {flag!r} cannot differ between trajectories; these can: {possible}.")
        if name in found:
            raise ChorusError(f"--vary {flag} is set twice. Put all values in one option, such as lr=0.01,0.02.")
        kind: TypeAdapter[float | int | str] = TypeAdapter(get_type_hints(Settings)[name])
        try:
            found[name] = tuple(kind.validate_python(value.strip()) for value in values.split(","))
        except ValidationError as error:
            value = error.errors()[0]["input"]
            raise ChorusError(
                f"--vary {text!r}: {value!r} is not a value of --{flag}. Expected NAME=VALUE,VALUE, such as lr=0.01,0.02."
            ) from None
    return found
