"""Log lines that people and machines can read: text, or one JSON object each.

A line of something that concerns a request carries its id, which is set once, in the task that
answers it. Standard library only: both the control plane and the stages' processes log so.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
DEFAULT_FORMAT, DEFAULT_LEVEL = "text", "warning"
ENVIRONMENT = {"level": "TIGHTFIT_LOG_LEVEL", "log_format": "TIGHTFIT_LOG_FORMAT"}
"""Variables by which a stage's process is told the same."""

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; all else was given with `extra`."""
_BARE = re.compile(r"[^\s\"=]+")

_context: ContextVar[Mapping[str, object]] = ContextVar("log_context", default={})  # noqa: B039


def log_context(**fields: object) -> None:
    """Add fields to every later line of this task (or thread), as `request_id`."""
    _context.set({**_context.get(), **fields})


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Formatter(logging.Formatter):
    """Adds the context's and its own fields to what a line was given.

    Args:
        fields: in every line of this process, such as which stage it is.
    """

    def __init__(self, fields: Mapping[str, object]) -> None:
        super().__init__()
        self._fields = fields

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """All fields of a line but time, level, logger and message."""
        given = {
            name: value
            for name, value in vars(record).items()
            if name not in _OWN and not name.startswith("_")  # Ray adds some of its own
        }
        return {**self._fields, **_context.get(), **given}

    def trace(self, record: logging.LogRecord) -> str:
        """The traceback; empty when there is none."""
        return self.formatException(record.exc_info) if record.exc_info else ""


class TextFormatter(_Formatter):
    """`time LEVEL logger: message name=value …`, on one line but for a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        parts = [f"{_time(record)} {record.levelname} {record.name}: {_one_line(record)}"]
        for name, value in self.fields(record).items():
            text = str(value)
            parts.append(f"{name}={text if _BARE.fullmatch(text) else json.dumps(text)}")
        return "\n".join(filter(None, (" ".join(parts), self.trace(record))))


def _one_line(record: logging.LogRecord) -> str:
    """The message; what would begin another line is escaped, so that nobody can forge one."""
    return re.sub(r"[\x00-\x1f\x7f\u2028\u2029]", _escaped, record.getMessage())


def _escaped(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1]


class JsonFormatter(_Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`, all fields, `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(
            (name, value) for name, value in self.fields(record).items() if name not in line
        )
        if trace := self.trace(record):
            line["traceback"] = trace
        return json.dumps(line, default=str)


def configure_logs(*, level: str, log_format: str, **fields: object) -> None:
    """Have this process log to standard error.

    Args:
        level: one of LEVELS.
        log_format: one of FORMATS.
        fields: in every line of this process.
    """
    formatter = JsonFormatter(fields) if log_format == "json" else TextFormatter(fields)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    os.environ[ENVIRONMENT["level"]] = level
    os.environ[ENVIRONMENT["log_format"]] = log_format


def log_environment() -> dict[str, str]:
    """Variables with which another process is to log as this one does."""
    return {name: os.environ[name] for name in ENVIRONMENT.values() if name in os.environ}


def configure_logs_from_environment(**fields: object) -> None:
    """`configure_logs` as `log_environment` of the parent says, by default as `serve` does."""
    level = os.environ.get(ENVIRONMENT["level"], DEFAULT_LEVEL)
    log_format = os.environ.get(ENVIRONMENT["log_format"], DEFAULT_FORMAT)
    configure_logs(
        level=level if level in LEVELS else DEFAULT_LEVEL,
        log_format=log_format if log_format in FORMATS else DEFAULT_FORMAT,
        **fields,
    )
