"""`--vary NAME=VALUE,VALUE,...`: what differs between trajectories, from words to values."""

from typing import get_type_hints

from pydantic import TypeAdapter, ValidationError

from chorus.population.errors import ChorusError
from chorus.train.settings import VARIABLE, Settings

Variations = dict[str, tuple[float | int | str, ...]]


def parse_variations(texts: tuple[str, ...]) -> Variations:
    """`("lr=0.01,0.02", "distil-after=1,saturation")` as values by setting. Whether they fit the run is for `Settings` to say.

    Raises:
        ChorusError: a name that cannot vary, one that comes twice, or a value that is none.
    """
    found: Variations = {}
    for text in texts:
        flag, _, values = text.partition("=")
        name = flag.strip().removeprefix("--").replace("-", "_")
        if name not in VARIABLE:
            possible = ", ".join(known.replace("_", "-") for known in VARIABLE)
            raise ChorusError(f"--vary {text!r}: {flag!r} cannot differ between trajectories; these may: {possible}.")
        if name in found:
            raise ChorusError(f"--vary {flag} is given twice. Give all its values in one, as in lr=0.01,0.02.")
        kind: TypeAdapter[float | int | str] = TypeAdapter(get_type_hints(Settings)[name])
        try:
            found[name] = tuple(kind.validate_python(value.strip()) for value in values.split(","))
        except ValidationError as error:
            value = error.errors()[0]["input"]
            raise ChorusError(
                f"--vary {text!r}: {value!r} is no value of --{flag}. Expected is, say, lr=0.01,0.02."
            ) from None
    return found
