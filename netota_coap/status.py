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


@attrs.frozen(kw_only=True)
class UpstreamStatus:
    """How it stands with an upstream.

    Attributes:
        uri: Of the upstream.
        last_contact: When it answered last; None: not yet.
        behind: How many of its streams are not here in the state that it has.
        refused: How often a state of it was refused.
        error: Why something is not level, or ""; one reason of maybe several.
    """

    uri: str
    last_contact: datetime | None
    behind: int
    refused: int
    error: str

    def __str__(self) -> str:
        """One line."""
        seen = f"{self.last_contact:%Y-%m-%d %H:%M:%SZ}" if self.last_contact else "never"
        line = f"{self.uri}: {self.behind} streams behind, seen {seen}"
        return f"{line}: {self.error}" if self.error else line


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
        upstreams: That are followed.
        fetched_bytes: Of files, from elsewhere; None: none are fetched.
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
    upstreams: tuple[UpstreamStatus, ...] = ()
    fetched_bytes: int | None = None

    @property
    def is_ready(self) -> bool:
        """Whether what is on disk is what is served."""
        return not self.issues

    def to_plain(self) -> dict[str, object]:
        """Return it as JSON has it; what is not so is left out."""
        plain = attrs.asdict(
            self,
            filter=lambda _, value: value not in (None, (), ""),
            value_serializer=lambda _, __, value: _instant(value),
        )
        plain["uptime_s"] = round(self.uptime_s, 3)
        return plain

    def __str__(self) -> str:
        """One line, for a service manager."""
        state = f"not reloaded: {self.issues[0]}" if self.issues else "serving"
        troubles = [*self.troubles, *(str(each) for each in self.upstreams if each.error)]
        fan_out = self.fan_out
        told = f", told {fan_out.told} in {fan_out.seconds:.2f} s" if fan_out else ""
        return (
            f"{state}: {self.packages} packages, {self.streams} streams, "
            f"{self.observers} observers{told}; loaded {self.reloaded:%Y-%m-%d %H:%M:%SZ}"
            + "".join(f"; {trouble}" for trouble in troubles)
        )


def _instant(value: object) -> object:
    return value.strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(value, datetime) else value
