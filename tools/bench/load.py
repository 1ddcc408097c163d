"""The load generator: compiles `load.c`, and runs it against a server on loopback."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import attrs

from netota_coap.coap import options as coap

SOURCE = Path(__file__).with_name("load.c")
SLICE_S = 0.01


@attrs.frozen
class Result:
    """What one run of the load generator counted.

    Attributes:
        requests: That were sent, repetitions not counted.
        answers: That came, of any code.
        lost: Requests that were given up.
        retransmissions: Of confirmable requests.
        resets: Requests that were reset.
        strays: Datagrams that belong to no open request, repeated answers among them.
        by_code: Answers by their code, dotted.
        started_s: On the clock of `time.monotonic`.
        seconds: From the start to the last answer.
        per_second: Answers.
        cpu_s: What the load generator took itself; near `seconds`, it is what was measured.
        median_us: Time until an answer, repetitions of the request included.
        p99_us: 99 % were no slower.
        max_us: The slowest.
        fewest: Answers that one of the window got.
        most: Likewise.
        transfers: Payloads that came whole.
        payload_bytes: Of the last payload, of all its blocks that came.
        slices: Answers in each hundredth of a second, from the start to the last answer.
    """

    requests: int
    answers: int
    lost: int
    retransmissions: int
    resets: int
    strays: int
    by_code: Mapping[str, int]
    started_s: float
    seconds: float
    per_second: float
    cpu_s: float
    median_us: float
    p99_us: float
    max_us: float
    fewest: int
    most: int
    transfers: int
    payload_bytes: int
    slices: Sequence[int]

    @property
    def failed(self) -> int:
        """Requests without an answer of success."""
        succeeded = sum(n for code, n in self.by_code.items() if code.startswith("2."))
        return self.requests - succeeded

    def between(self, from_s: float, to_s: float) -> Sequence[int]:
        """Return the slices of a time on the clock of `time.monotonic`."""
        first, last = (max(0, round((t - self.started_s) / SLICE_S)) for t in (from_s, to_s))
        return self.slices[first:last]


def build(directory: Path) -> Path:
    """Compile the load generator into a directory; the program."""
    program = directory / "load"
    subprocess.run(["cc", "-O2", "-o", program, SOURCE], check=True)
    return program


def options(path: Iterable[str], query: Iterable[str] = ()) -> bytes:
    """Encode the options of a request."""
    return coap.encode(
        [
            *((coap.URI_PATH, segment.encode()) for segment in path),
            *((coap.URI_QUERY, parameter.encode()) for parameter in query),
        ]
    )


@attrs.frozen
class Load:
    """A load, to be put on any server.

    Attributes:
        program: As `build` made it.
        requests: File with the options of a request in each line, in hexadecimal digits.
        window: Requests, or with `szx` transfers, that are in flight.
        sockets: That they are spread over.
        szx: Fetch block by block, of 2^(szx+4) bytes; None: no blocks are asked for.
    """

    program: Path
    requests: Path
    window: int = 1
    sockets: int = 1
    szx: int | None = None

    @classmethod
    def write(cls, program: Path, requests: Path, lines: Iterable[bytes]) -> Load:
        """Make a load of the options of requests, which are written to a file."""
        requests.write_text("".join(f"{line.hex()}\n" for line in lines))
        return cls(program, requests)

    def start(
        self, port: int, seconds: float, *more: str, host: str = "127.0.0.1"
    ) -> subprocess.Popen[str]:
        """Start it; SIGTERM ends it early.

        Args:
            port: Of the server.
            seconds: How long, at most 60.
            more: Arguments of the program.
            host: An address of loopback.
        """
        blocks = () if self.szx is None else ("-b", str(self.szx))
        shape = ("-w", str(self.window), "-s", str(self.sockets), "-t", str(seconds))
        target = (host, str(port), str(self.requests))
        return subprocess.Popen(
            [str(self.program), *blocks, *shape, *more, *target],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, port: int, seconds: float, *more: str, host: str = "127.0.0.1") -> Result:
        """Run it to its end, as `start`."""
        return result(self.start(port, seconds, *more, host=host))


def result(running: subprocess.Popen[str]) -> Result:
    """Wait for a load to end.

    Raises:
        RuntimeError: It failed; what it said.
    """
    out, err = running.communicate()
    if running.returncode:
        raise RuntimeError(err.strip())
    return Result(**json.loads(out))
