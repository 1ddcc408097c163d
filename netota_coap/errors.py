"""Errors, named by what went wrong.

Each adapter (CLI, CoAP, …) has one table from these classes to its own codes; a class without an
entry has the code of its base. This module imports nothing of the package and knows no protocol.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs


class NetotaError(Exception):
    """Base of all errors that this package raises on purpose.

    Attributes:
        detail: One sentence that says what is wrong and where.
        hint: One sentence that says what to do about it, or "".
    """

    def __init__(self, detail: str, *, hint: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint


def printable(text: str) -> str:
    """Escape characters that could rewrite a terminal or a log, or that cannot be shown."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@attrs.frozen
class Issue:
    """A broken rule.

    Attributes:
        place: Path of the field from the root of the datum, such as `archives[0].envelope.sha256`;
            "" for the datum as a whole.
        file: The datum's file, relative to the repository, or "".
    """

    place: str
    reason: str
    file: str = ""

    def inside(self, place: str) -> Issue:
        """Return the issue as seen from an enclosing datum, in which this one is at `place`."""
        joint = "." if place and self.place and not self.place.startswith("[") else ""
        return attrs.evolve(self, place=f"{place}{joint}{self.place}")

    def __str__(self) -> str:
        return printable(": ".join(part for part in (self.file, self.place, self.reason) if part))


class InvalidDataError(NetotaError, ValueError):
    """A datum breaks rules; all broken ones are listed."""

    def __init__(self, issues: Iterable[Issue], *, hint: str = "") -> None:
        self.issues = tuple(issues)
        super().__init__("; ".join(str(issue) for issue in self.issues), hint=hint)


class NotFoundError(NetotaError, LookupError):
    """The name does not exist (any more)."""


class DamagedError(NotFoundError):
    """The file is stored here but its bytes are not what they should be."""


class NotYetError(NetotaError):
    """The file is being fetched; ask again later."""

    def __init__(self, detail: str, *, after_s: int) -> None:
        super().__init__(detail)
        self.after_s = after_s


class NotFetchedError(NotYetError):
    """The file could not be fetched from another host."""


class RepositoryError(NetotaError):
    """A repository cannot be read or written."""


class RepositoryLockedError(RepositoryError):
    """Another process is writing and did not finish in time."""


class RepositoryConflictError(RepositoryError):
    """The state of the repository does not allow the change."""


class TransferError(NetotaError):
    """A request to another host failed."""

    def __init__(self, detail: str, *, uri: str, hint: str = "") -> None:
        super().__init__(f"{uri}: {detail}", hint=hint)
        self.uri = uri


class PeerError(TransferError):
    """The peer answered with an error.

    Attributes:
        code: Response code, such as `4.04` for CoAP or `404` for HTTP.
        retry_after_s: Seconds after which the peer says to ask again, or None.
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
    """The bytes that arrived are not those that were announced."""


class RollbackError(TransferError):
    """The peer offers a sequence below one that it offered before."""


class AddressError(NetotaError):
    """A local address cannot be listened on."""


class ConfigError(NetotaError):
    """An option or a configuration value cannot be used."""
