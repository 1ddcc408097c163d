"""service/logs.py: lines for people, for the journal, for machines."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from netota_coap.service import logs
from tests.support.serving import COMMAND, PROJECT


def record(
    message: str, *arguments: object, level: int = logging.INFO, **extra: object
) -> logging.LogRecord:
    made = logging.getLogger().makeRecord(
        "netota_coap.test", level, __file__, 1, message, arguments, None, extra=extra
    )
    made.created = 1_795_000_000.0625
    return made


LINES = [
    ("plain", record("reloaded %d files", 3, ms=2.5), "INFO reloaded 3 files"),
    ("plain", record("a\nWARNING b\x1b[2J"), r"INFO a\nWARNING b\x1b[2J"),
    ("journal", record("reloaded", ms=2.5, file="a b"), '<6>reloaded ms=2.5 file="a b"'),
    ("journal", record("is gone", level=logging.WARNING, why=""), '<4>is gone why=""'),
    ("journal", record("a\nb", level=logging.ERROR, c="d\ne"), r'<3>a\nb c="d\ne"'),
    ("journal", record("no", level=logging.DEBUG), "<7>no"),
    ("journal", record("end", level=logging.CRITICAL), "<2>end"),
    (
        "json",
        record('say "%s"', "é\n", path=Path("/x"), number=1),
        json.dumps(
            {
                "time": "2026-11-18T11:06:40.062Z",
                "level": "info",
                "logger": "netota_coap.test",
                "message": 'say "é\n"',
                "path": "/x",
                "number": 1,
            }
        ),
    ),
]


@pytest.mark.parametrize(("form", "made", "line"), LINES)
def test_lines(form: str, made: logging.LogRecord, line: str) -> None:
    """A record is one line, whatever is in it."""
    assert logs.Formatter(form).format(made) == line


@pytest.mark.parametrize("form", logs.FORMATS)
def test_exceptions(form: str) -> None:
    """A traceback is shown, each line of it with the priority, and one line of JSON."""
    made = record("bug", level=logging.ERROR)
    try:
        int("no\x07")
    except ValueError:
        made.exc_info = sys.exc_info()
    text = logs.Formatter(form).format(made)
    lines = text.splitlines()

    assert lines[0].startswith({"plain": "ERROR bug", "journal": "<3>bug", "json": "{"}[form])
    assert "ValueError: invalid literal for int() with base 10: 'no" in lines[-1]
    assert "\x07" not in text
    if form == "json":
        assert len(lines) == 1
        assert json.loads(lines[0])["exception"].startswith("Traceback")
    elif form == "journal":
        assert all(line.startswith("<3>") for line in lines)


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root of all loggers, put back afterwards."""
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    yield root
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def test_configured(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """What is at least so bad goes to standard error, once."""
    for level in ("debug", "warning"):
        logs.configure(level, "auto", {})
    log = logging.getLogger("netota_coap.test")
    log.info("not said")
    log.warning("said")
    logs.set_level("info")
    log.info("said, too")

    assert capsys.readouterr().err == "WARNING said\nINFO said, too\n"


def test_suitable_for_no_file() -> None:
    """What leads to no file leads to no journal."""
    assert logs.suitable({"JOURNAL_STREAM": "1:2"}, io.StringIO()) == "plain"


@pytest.mark.parametrize(
    ("stream", "form", "line"),
    [
        ("ours", "auto", r"<6>no --state: .*"),
        ("another", "auto", r"INFO no --state: .*"),
        ("ours", "plain", r"INFO no --state: .*"),
        ("another", "json", r'\{"time": .* "message": "no --state: .*"\}'),
    ],
)
def test_of_a_service(tmp_path: Path, stream: str, form: str, line: str) -> None:
    """The command sees whether it writes to the journal, and does what it is told."""
    read, write = os.pipe()
    status = os.fstat(write)
    number = status.st_ino if stream == "ours" else status.st_ino + 1
    subprocess.run(
        [*COMMAND, "serve", str(tmp_path / "nix"), "--log-format", form],
        cwd=PROJECT,
        stderr=write,
        env=os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{number}"},
        check=False,
    )
    os.close(write)
    with os.fdopen(read) as lines:
        assert re.fullmatch(line, lines.readline().rstrip("\n"))
