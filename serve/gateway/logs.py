"""Logs as lines of JSON, one object each, for whoever collects them."""

import json
import logging
import time
from typing import Any


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
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(*, as_json: bool, is_verbose: bool) -> None:
    """Log to standard error: as text only what needs attention, unless verbose; as JSON every request, too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.INFO if is_verbose or as_json else logging.WARNING, handlers=[handler])
