"""How a service logs: for people, for systemd's journal, for machines.

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

# What a record has that nobody gave it.
_OWN = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime"))
# Of syslog, as sd-daemon(3) has them.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
_WORST = 2


@attrs.frozen
class _Line:
    """What there is to say.

    Attributes:
        record: As it was logged.
        message: In one line.
        given: What `extra` was given.
        trace: Of an exception, or nothing.
    """

    record: logging.LogRecord
    message: str
    given: Mapping[str, Any]
    trace: str

    def lines(self, message: str) -> list[str]:
        return [printable(line) for line in (message, *self.trace.splitlines())]


def _plain(line: _Line) -> str:
    return "\n".join(line.lines(f"{line.record.levelname} {line.message}"))


def _journal(line: _Line) -> str:
    level = f"<{_PRIORITIES.get(line.record.levelno, _WORST)}>"
    pairs = (f" {key}={_quoted(str(value))}" for key, value in line.given.items())
    return "\n".join(level + each for each in line.lines(line.message + "".join(pairs)))


def _quoted(value: str) -> str:
    return json.dumps(value) if not value or set(value) & set(' "=\n') else value


def _json(line: _Line) -> str:
    time = datetime.fromtimestamp(line.record.created, UTC)
    plain = {
        "time": f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z",
        "level": line.record.levelname.lower(),
        "logger": line.record.name,
        "message": line.message,
        **line.given,
        **({"exception": line.trace} if line.trace else {}),
    }
    return json.dumps(plain, default=str)


FORMATS: Mapping[str, Callable[[_Line], str]] = {
    "plain": _plain,
    "journal": _journal,
    "json": _json,
}
"""How a line is written, by the name of the format."""


class Formatter(logging.Formatter):
    """Writes records in one of the formats."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._write = FORMATS[name]

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        given = {key: value for key, value in vars(record).items() if key not in _OWN}
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return self._write(_Line(record, record.getMessage(), given, trace))


def suitable(environment: Mapping[str, str], stream: TextIO) -> str:
    """Return the format that suits where a stream leads: to the journal, or elsewhere."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return "plain"
    # Whoever is started from a service inherits the variable, but maybe not the stream.
    journal = environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return "journal" if journal else "plain"


def configure(level: str, form: str, environment: Mapping[str, str]) -> None:
    """Log to standard error from now on.

    Args:
        level: As in `set_level`.
        form: Key of `FORMATS`, or `auto`.
        environment: Of the process.
    """
    handler = logging.StreamHandler(sys.stderr)
    chosen = suitable(environment, sys.stderr) if form == "auto" else form
    handler.setFormatter(Formatter(chosen))
    logging.basicConfig(handlers=[handler], force=True)
    set_level(level)
    # What they say of hostile datagrams, or of each request, is nothing to an operator.
    for name in ("netota_coap.aiocoap", "asyncio", "httpx2"):
        logging.getLogger(name).setLevel(logging.ERROR)


def set_level(level: str) -> None:
    """Log what is at least so bad: `debug`, `info`, `warning` or `error`."""
    logging.getLogger().setLevel(level.upper())
