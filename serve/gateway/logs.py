"""Log formats: text, or one JSON object per line for log collectors. In neither can text from clients forge a log line."""

import json
import logging
import re
import time
from typing import Any

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class TextFormatter(logging.Formatter):
    """Time and message. Control characters are escaped; the lines of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, then the lines of a traceback if there is one."""
        first = f"{self.formatTime(record)} {_escape(record.getMessage())}"
        more = [self.formatException(record.exc_info)] if record.exc_info else []
        more += [self.formatStack(record.stack_info)] if record.stack_info else []
        return "\n  ".join([first, *(_escape(line) for text in more for line in text.split("\n"))])


class JsonFormatter(logging.Formatter):
    """Time (UTC), level, logger, message, and the `fields` passed in `extra`."""

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
    """Log to standard error. Text contains only warnings and errors unless verbose; JSON contains every request too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.INFO if is_verbose or as_json else logging.WARNING, handlers=[handler])


def _escape(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)
