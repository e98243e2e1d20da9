"""Find why an engine failed: the last exception in its log that does not merely repeat another process's."""

import re

_PREFIX = re.compile(r"^(?:\(\S+ pid=\d+\) ?)?(?:(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] ?)?")
"""What vLLM puts before a line: the process and, for log records, the level, date, time and place."""
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Exit)): (.+)")
_USAGE = re.compile(r"^\S+: error: (.+)")
_REPEATED = re.compile(
    r"Engine core initialization failed|EngineCore encountered an issue|EngineDeadError|See (?:root cause|stack trace)"
)
_VALIDATION = re.compile(r"^\d+ validation errors? for ")
_DETAIL = re.compile(r"^ +(?:Value error, |Assertion failed, )?(.+?)(?: \[type=.*)?$")


def root_cause(log: str) -> str | None:
    """The message of the last such exception; its name is added only to a single word. None if there is no such exception."""
    lines = [_PREFIX.sub("", line, count=1) for line in log.splitlines()]
    for idx in reversed(range(len(lines))):
        if found := _USAGE.match(lines[idx]):
            return found[1]
        if (found := _EXCEPTION.match(lines[idx])) and not _REPEATED.search(lines[idx]):
            name, message = found.groups()
            if _VALIDATION.match(message):
                details = [detail[1] for line in lines[idx + 1 : idx + 4] if (detail := _DETAIL.match(line))]
                details = [each for each in details if not each.startswith("For further information")]
                return " ".join([message, *details[:1]]) if not details or " " not in details[0] else details[0]
            return message if " " in message else f"{name}: {message}"
    return None
