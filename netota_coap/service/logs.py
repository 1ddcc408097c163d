"""Log formats: for people, for systemd's journal, for programs.

Source: `spec/operation.md`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

import attrs

from netota_coap.errors import printable

# Attributes of every record; all others were passed as `extra`.
_STANDARD = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime"))
# Priorities of syslog, sd-daemon(3).
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
_CRITICAL = 2


@attrs.frozen
class _Entry:
    record: logging.LogRecord
    message: str
    extra: Mapping[str, Any]
    trace: str  # of an exception, or ""

    def lines(self, message: str) -> list[str]:
        return [printable(line) for line in (message, *self.trace.splitlines())]


def _plain(entry: _Entry) -> str:
    return "\n".join(entry.lines(f"{entry.record.levelname} {entry.message}"))


def _journal(entry: _Entry) -> str:
    level = f"<{_PRIORITIES.get(entry.record.levelno, _CRITICAL)}>"
    pairs = (f" {key}={_quoted(str(value))}" for key, value in entry.extra.items())
    return "\n".join(level + each for each in entry.lines(entry.message + "".join(pairs)))


def _quoted(value: str) -> str:
    return json.dumps(value) if not value or set(value) & set(' "=\n') else value


def _json(entry: _Entry) -> str:
    time = datetime.fromtimestamp(entry.record.created, UTC)
    plain = {
        "time": f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z",
        "level": entry.record.levelname.lower(),
        "logger": entry.record.name,
        "message": entry.message,
        **entry.extra,
        **({"exception": entry.trace} if entry.trace else {}),
    }
    return json.dumps(plain, default=str)


_Format = Callable[[_Entry], str]
FORMATS: Mapping[str, _Format] = {"plain": _plain, "journal": _journal, "json": _json}
"""Functions that format a record, by the values of `log.format`."""


class Formatter(logging.Formatter):
    """Writes records in one of `FORMATS`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._write = FORMATS[name]

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text."""
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return self._write(_Entry(record, record.getMessage(), extra, trace))


def suitable(environment: Mapping[str, str], stream: TextIO) -> str:
    """Return `journal` if a stream leads to systemd's journal, else `plain`."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return "plain"
    # Children of a service inherit the variable, but their stream may lead elsewhere.
    journal = environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return "journal" if journal else "plain"


def configure(level: str, form: str, environment: Mapping[str, str]) -> None:
    """Log to standard error; `form` is a key of `FORMATS` or `auto`."""
    handler = logging.StreamHandler(sys.stderr)
    chosen = suitable(environment, sys.stderr) if form == "auto" else form
    handler.setFormatter(Formatter(chosen))
    logging.basicConfig(handlers=[handler], force=True)
    set_level(level)
    # These libraries log each hostile datagram or request, which does not concern an operator.
    for name in ("netota_coap.aiocoap", "asyncio", "httpx2"):
        logging.getLogger(name).setLevel(logging.ERROR)


def set_level(level: str) -> None:
    """Log this level and worse: `debug`, `info`, `warning` or `error`."""
    logging.getLogger().setLevel(level.upper())
