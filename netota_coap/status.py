"""What a service does now, for its operator."""

from __future__ import annotations

from datetime import datetime

import attrs


@attrs.frozen
class FanOut:
    """How observers were told of the last change.

    Attributes:
        told: How many acknowledged it.
        seconds: From the change to the last acknowledgement so far.
    """

    told: int
    seconds: float


@attrs.frozen
class Status:
    """What a service does now.

    Attributes:
        version: Of the software.
        uptime_s: Since the start.
        packages: That are served.
        streams: That are served.
        observers: Over CoAP.
        reloaded: When what is served was loaded.
        issues: Why what is on disk is not served, the first few of many; empty: it is.
        fan_out: Of the last change that observers were told of.
        troubles: What else is wrong, as a state directory that cannot be written; for people.
    """

    version: str
    uptime_s: float
    packages: int
    streams: int
    observers: int
    reloaded: datetime
    issues: tuple[str, ...] = ()
    fan_out: FanOut | None = None
    troubles: tuple[str, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether what is on disk is what is served."""
        return not self.issues

    def to_plain(self) -> dict[str, object]:
        """Return it as JSON has it; what is not so is left out."""
        plain = attrs.asdict(self, filter=lambda _, value: value not in (None, ()))
        plain["uptime_s"] = round(self.uptime_s, 3)
        plain["reloaded"] = self.reloaded.strftime("%Y-%m-%dT%H:%M:%SZ")
        return plain

    def __str__(self) -> str:
        """One line, for a service manager."""
        state = f"not reloaded: {self.issues[0]}" if self.issues else "serving"
        fan_out = self.fan_out
        told = f", told {fan_out.told} in {fan_out.seconds:.2f} s" if fan_out else ""
        return (
            f"{state}: {self.packages} packages, {self.streams} streams, "
            f"{self.observers} observers{told}; loaded {self.reloaded:%Y-%m-%d %H:%M:%SZ}"
            + "".join(f"; {trouble}" for trouble in self.troubles)
        )
