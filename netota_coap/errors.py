"""What can go wrong, named by what went wrong.

Each adapter (CLI, CoAP, …) owns one table from these classes to its own codes, looked up along
the class hierarchy. This module imports nothing and knows no protocol.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs


class NetotaError(Exception):
    """Base of all errors that this package raises on purpose.

    Attributes:
        detail: What is wrong and where, one sentence for a person.
        hint: What to do about it, one sentence, or "".
    """

    def __init__(self, detail: str, *, hint: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint


def printable(text: str) -> str:
    """Escape what would rewrite a terminal or a log, or could not be written to one."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@attrs.frozen
class Issue:
    """One thing wrong with a datum.

    Attributes:
        place: Path of the field from the root of the datum, as `archives[0].envelope.sha256`;
            "" for the datum as a whole.
        reason: The rule that is broken.
        file: The file, relative to the repository; "" where the datum is not a file's.
    """

    place: str
    reason: str
    file: str = ""

    def inside(self, place: str) -> Issue:
        """Return the issue as seen from the datum that contains this one at `place`."""
        joint = "." if place and self.place and not self.place.startswith("[") else ""
        return attrs.evolve(self, place=f"{place}{joint}{self.place}")

    def __str__(self) -> str:
        return printable(": ".join(part for part in (self.file, self.place, self.reason) if part))


class InvalidDataError(NetotaError, ValueError):
    """A datum breaks rules; all broken ones are listed.

    Attributes:
        issues: At least one.
    """

    def __init__(self, issues: Iterable[Issue], *, hint: str = "") -> None:
        self.issues = tuple(issues)
        super().__init__("; ".join(str(issue) for issue in self.issues), hint=hint)


class NotFoundError(NetotaError, LookupError):
    """What was asked for by name does not exist (any more)."""


class DamagedError(NotFoundError):
    """What was asked for is here, but is not what it should be."""


class NotYetError(NetotaError):
    """What was asked for is not here yet, but on its way.

    Attributes:
        after_s: When to ask again, seconds.
    """

    def __init__(self, detail: str, *, after_s: int) -> None:
        super().__init__(detail)
        self.after_s = after_s


class NotFetchedError(NotYetError):
    """What was asked for should come from another host, and could not be had there."""


class RepositoryError(NetotaError):
    """A repository cannot be read or written."""


class RepositoryLockedError(RepositoryError):
    """Somebody else is writing, and did not stop in time."""


class RepositoryConflictError(RepositoryError):
    """The change does not go with the state that the repository is in."""


class TransferError(NetotaError):
    """Talking to another host failed.

    Attributes:
        uri: What was asked for.
    """

    def __init__(self, detail: str, *, uri: str, hint: str = "") -> None:
        super().__init__(f"{uri}: {detail}", hint=hint)
        self.uri = uri


class PeerError(TransferError):
    """The peer answered with an error.

    Attributes:
        code: Its response code, dotted as in `4.04`; that of HTTP as in `404`.
        retry_after_s: When to ask again, seconds, if it is not available now and said so.
    """

    def __init__(
        self,
        detail: str,
        *,
        uri: str,
        code: str,
        retry_after_s: float | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(f"{code} {detail}", uri=uri, hint=hint)
        self.code = code
        self.retry_after_s = retry_after_s


class IntegrityError(TransferError):
    """What arrived is not what was promised."""


class RollbackError(TransferError):
    """The peer offers a sequence below one that it offered before."""


class AddressError(NetotaError):
    """A local address cannot be listened on."""


class ConfigError(NetotaError):
    """An option or a configuration value cannot be used."""
