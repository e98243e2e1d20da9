"""The one sentence of an engine's log that says why it failed."""

import pytest

from chorus.serve.gateway.engines.causes import root_cause

CORE, SERVER = "(EngineCore pid=812) ", "(APIServer pid=790) "
LOGGED = CORE + "ERROR 11-27 09:12:01 [core.py:1136] "

OF_THE_CORE = f"""
{LOGGED}EngineCore failed to start.
{LOGGED}Traceback (most recent call last):
{LOGGED}  File "core.py", line 1, in run_engine_core
{LOGGED}    engine_core = EngineCoreProc(*args)
{LOGGED}ValueError: To serve at least one request, 2.5 GiB KV cache is needed.
{CORE}Process EngineCore:
{CORE}Traceback (most recent call last):
{CORE}  File "process.py", line 314, in _bootstrap
{CORE}    self.run()
{CORE}ValueError: To serve at least one request, 2.5 GiB KV cache is needed.
{SERVER}Traceback (most recent call last):
{SERVER}  File "entry.py", line 9, in <module>
{SERVER}RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
engine process ended with status 1
"""
OF_A_SETTING = f"""
{SERVER}Traceback (most recent call last):
{SERVER}  File "entry.py", line 9, in <module>
{SERVER}pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
{SERVER}  Value error, User-specified max_model_len (100000) is greater than the derived max_model_len (256). [type=value_error, \
input_value=ArgsKwargs((), {{}}), input_type=ArgsKwargs]
{SERVER}    For further information visit https://errors.pydantic.dev/2.12/v/value_error
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (OF_THE_CORE, "To serve at least one request, 2.5 GiB KV cache is needed."),
        (OF_A_SETTING, "User-specified max_model_len (100000) is greater than the derived max_model_len (256)."),
        (
            "usage: entry.py [-h]\nentry.py: error: unrecognized arguments: --no-such\n",
            "unrecognized arguments: --no-such",
        ),
        (
            "chorus.population.errors.ChorusError: member 'a' has a sliding window.\n",
            "member 'a' has a sliding window.",
        ),
        ("Traceback (most recent call last):\nKeyError: 'rope'\n", "KeyError: 'rope'"),
        ("OSError: inner one\n\nDuring handling of the above:\n\nOSError: no file named x\n", "no file named x"),
        ("INFO: ready\nengine process ended with status -9\n", None),
        ("INFO a line with ValueError: in its middle\n", None),
        ("", None),
    ],
)
def test_the_root_cause(log: str, cause: str | None) -> None:
    assert root_cause(log) == cause
