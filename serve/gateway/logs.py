"""Logs as text, or as lines of JSON for whoever collects them. What others sent cannot look like a line of ours in either."""

import json
import logging
import re
import time
from typing import Any

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class TextFormatter(logging.Formatter):
    """Time and message. Control characters are escaped, and further lines (of a traceback) are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and more for a traceback."""
        first = f"{self.formatTime(record)} {_escape(record.getMessage())}"
        more = [self.formatException(record.exc_info)] if record.exc_info else []
        more += [self.formatStack(record.stack_info)] if record.stack_info else []
        return "\n  ".join([first, *(_escape(line) for text in more for line in text.split("\n"))])


class JsonFormatter(logging.Formatter):
    """Time (UTC), level, logger and message, and the `fields` that a call gave as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        milliseconds = int(record.msecs)
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{milliseconds:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(*, as_json: bool, is_verbose: bool) -> None:
    """Log to standard error: as text only what needs attention, unless verbose; as JSON every request, too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.INFO if is_verbose or as_json else logging.WARNING, handlers=[handler])


def _escape(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)
