"""The log of a service: a line of JSON for each event, with the session or job it is of."""

from __future__ import annotations

import json
import logging
import sys
import time

FIELDS = ("session", "job", "bundle", "reason", "chunks", "waited", "seed", "client")
"""What a line may say beside time, level and message."""


class JsonLines(logging.Formatter):
    """One line each: whatever is in a message, JSON keeps it on its line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "from": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(level: str = "info") -> None:
    """Let the service, and uvicorn under it, write their log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("forcingkv.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name == "forcingkv.serve" else "WARNING")
