"""Compiles the load generator `load.c`, and runs it against a server on loopback."""

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
    """Counters of one run of the load generator.

    Attributes:
        requests: Requests that were sent, without retransmissions.
        answers: Responses of any code.
        lost: Requests without a response after all retransmissions.
        strays: Datagrams that belong to no open request, repeated responses among them.
        by_code: Responses by code, as `2.05`.
        started_s: On the clock of `time.monotonic`.
        seconds: From the start to the last response.
        per_second: Responses.
        cpu_s: CPU time of the load generator; near `seconds`, it was the bottleneck.
        median_us: Time until a response, retransmissions included.
        fewest: Responses to the slot of the window that got the fewest.
        most: Responses to the slot that got the most.
        transfers: Complete block-wise payloads.
        payload_bytes: Of the last payload, all its blocks.
        slices: Responses in each hundredth of a second, from the start to the last response.
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
        """Requests without a success response."""
        succeeded = sum(n for code, n in self.by_code.items() if code.startswith("2."))
        return self.requests - succeeded

    def between(self, from_s: float, to_s: float) -> Sequence[int]:
        """Return the slices of a period on the clock of `time.monotonic`."""
        first, last = (max(0, round((t - self.started_s) / SLICE_S)) for t in (from_s, to_s))
        return self.slices[first:last]


def build(directory: Path) -> Path:
    """Compile the load generator into a directory, and return the program."""
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
    """A load for any server.

    Attributes:
        requests: File with the options of one request per line, in hexadecimal digits.
        window: Requests in flight; with `szx`, transfers in flight.
        sockets: Number of sockets that send them.
        szx: Size exponent of blocks of 2^(szx+4) bytes; None for requests without Block2.
    """

    program: Path
    requests: Path
    window: int = 1
    sockets: int = 1
    szx: int | None = None

    @classmethod
    def write(cls, program: Path, requests: Path, lines: Iterable[bytes]) -> Load:
        """Write the options of requests to a file, and return a load of them."""
        requests.write_text("".join(f"{line.hex()}\n" for line in lines))
        return cls(program, requests)

    def start(
        self, port: int, seconds: float, *more: str, host: str = "127.0.0.1"
    ) -> subprocess.Popen[str]:
        """Start the load generator for at most 60 seconds; SIGTERM ends it early.

        `more` are arguments of the program; `host` is an address of loopback.
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
        """Run the load generator to its end; arguments as in `start`."""
        return result(self.start(port, seconds, *more, host=host))


def result(running: subprocess.Popen[str]) -> Result:
    """Wait for a load to end.

    Raises:
        RuntimeError: The load generator failed; the text is its error output.
    """
    out, err = running.communicate()
    if running.returncode:
        raise RuntimeError(err.strip())
    return Result(**json.loads(out))
