"""What a release engineer does to a stream: publish, close, reopen.

Each change is open → change → check → commit; the first and the last are `repository.change`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path, PurePath
from urllib.parse import quote

import attrs

from netota_coap import repository
from netota_coap.artefacts import envelope_of
from netota_coap.errors import InvalidDataError, Issue, NotFoundError, RepositoryConflictError
from netota_coap.model import (
    CONTENT_ATTRIBUTES,
    LIMITS,
    Archive,
    AttributeValue,
    Content,
    Envelope,
    Offer,
    Package,
    Stream,
    StreamName,
    clashes,
    name_rule,
)

DEFAULT_MEDIA_TYPE = "application/octet-stream"
DEFAULT_METRIC = 100


@attrs.frozen
class ArchiveSource:
    """A file to be published, and what is said about it.

    Attributes:
        path: Of the file.
        name: Of the archive.
        media_type: Of the file.
        content: What is in it.
    """

    path: Path
    name: str
    media_type: str = DEFAULT_MEDIA_TYPE
    content: Content = Content()

    @classmethod
    def parse(cls, text: str) -> ArchiveSource:
        """Read `FILE[,name=…,media-type=…,ATTRIBUTE=VALUE…]`.

        `true` and `false` are booleans, decimal digits integers, anything else text, except where
        the attribute is one of content's own. The name is that of the file without its suffix
        where none is given.

        Raises:
            InvalidDataError: It is not of that form or breaks a rule of the model.
        """
        file, *settings = text.split(",")
        given: dict[str, str] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or key in given:
                reason = "is there twice" if equals else "must be KEY=VALUE"
                raise InvalidDataError([Issue(setting, reason, file)])
            given[key] = value
        path = Path(file)
        name = given.pop("name", path.stem)
        media_type = given.pop("media-type", DEFAULT_MEDIA_TYPE)
        own = {key: _value(given.pop(key), key) for key in CONTENT_ATTRIBUTES if key in given}
        free = {key: _value(value) for key, value in given.items()}
        reasons = {"name": name_rule(name), "media-type": Envelope.rules()["type"](media_type)}
        issues = [Issue(place, reason, file) for place, reason in reasons.items() if reason]
        try:
            content = Content(**own, attributes=free)  # type: ignore[arg-type]
        except InvalidDataError as error:
            raise InvalidDataError(
                [*issues, *(attrs.evolve(issue, file=file) for issue in error.issues)]
            ) from error
        if issues:
            raise InvalidDataError(issues)
        return cls(path, name, media_type, content)

    def archive(self, version: str, offers: Sequence[Offer], progress: Progress) -> Archive:
        """Read the file and describe it, the templates of its offers filled in."""
        envelope = envelope_of(self.path, self.media_type, progress)
        names = {
            "name": self.name,
            "version": version,
            "file": PurePath(self.path).name,
            "sha256": envelope.sha256.hex(),
        }
        try:
            filled = tuple(attrs.evolve(offer, url=_fill(offer.url, names)) for offer in offers)
        except InvalidDataError as error:
            file = str(self.path)
            raise InvalidDataError(attrs.evolve(i, file=file) for i in error.issues) from error
        return Archive(name=self.name, envelope=envelope, content=self.content, offers=filled)


Progress = Callable[[int], object]


def _value(text: str, attribute: str = "") -> AttributeValue:
    if text in ("true", "false") and attribute in ("", "debug"):
        return text == "true"
    if attribute == "" and _is_number(text):
        return int(text)
    return text


def _is_number(text: str) -> bool:
    # Python refuses to read thousands of digits; so many are left as text, which is too long.
    # A leading zero is a sign that it is none: a serial, a date.
    shaped = text.isascii() and text.isdecimal() and (text == "0" or text[0] != "0")
    return shaped and len(text) <= LIMITS["text"].value


def _fill(template: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        template = template.replace(f"{{{name}}}", quote(value, safe="+"))
    if "{" in template or "}" in template:
        known = ", ".join(f"{{{name}}}" for name in names)
        raise InvalidDataError([Issue("offer", f"{template!r}: the templates are {known}")])
    return template


def parse_offer(text: str) -> Offer:
    """Read `URL[,METRIC]`.

    Raises:
        InvalidDataError: It breaks a rule of offers.
    """
    url, comma, metric = text.rpartition(",")
    if comma and _is_number(metric):
        return Offer(url=url, metric=int(metric))
    return Offer(url=text, metric=DEFAULT_METRIC)


def publish(
    root: Path,
    name: StreamName,
    version: str,
    sources: Sequence[ArchiveSource],
    offers: Sequence[Offer] = (),
    *,
    now: datetime,
    progress: Progress = lambda _: None,
) -> Stream:
    """Replace the archives, and so the version, of a stream in one step.

    Args:
        root: Of the repository.
        name: Of the stream; it is made if need be.
        version: Of all archives.
        sources: One per archive.
        offers: Templates, for each archive; none: those of the package.
        now: The time of publishing, in whole seconds.
        progress: Called with the number of bytes read, again and again.

    Returns:
        The new state.

    Raises:
        InvalidDataError: Something given breaks a rule.
        RepositoryConflictError: The stream is closed.
        RepositoryError: It could not be written; nothing changed.
    """
    package, present = repository.read(root, name)
    _refuse_closed(root, name, present)
    # Before files are read, which may take long: what is wrong without them.
    reason = Stream.rules()["version"](version)
    issues = [Issue("version", reason)] if reason else []
    issues += clashes((source.name for source in sources), "--archive {name}")
    if issues:
        raise InvalidDataError(issues)
    templates = tuple(offers) or package.offers
    archives = tuple(source.archive(version, templates, progress) for source in sources)

    def make(_package: Package, present: Stream | None) -> Stream:
        _refuse_closed(root, name, present)
        fresh = Stream(version=version, sequence=1, published=now, archives=archives)
        if present is None:
            return fresh
        return attrs.evolve(fresh, title=present.title, poll_s=present.poll_s)

    return repository.change(root, name, make)


def _refuse_closed(root: Path, name: StreamName, present: Stream | None) -> None:
    if present and present.closed:
        raise RepositoryConflictError(
            f"{'/'.join(name)} is closed",
            hint=f"Open it again first: netota-coap reopen {root} {'/'.join(name)}",
        )


def close(root: Path, name: StreamName, replacement: StreamName | None = None) -> Stream:
    """Close a stream: nothing new will come; devices may be sent to a replacement.

    Raises:
        NotFoundError: There is no such stream, or no such replacement.
        RepositoryConflictError: It is closed already, with this replacement, or would be its own.
        RepositoryError: It could not be written; nothing changed.
    """
    if replacement == name:
        raise RepositoryConflictError(f"{'/'.join(name)} cannot be its own replacement")
    if replacement and repository.read(root, replacement)[1] is None:
        raise NotFoundError(f"there is no stream {'/'.join(replacement)} to be the replacement")

    def make(_package: Package, present: Stream | None) -> Stream:
        state = _existing(name, present)
        if state.closed and state.replacement == replacement:
            raise RepositoryConflictError(f"{'/'.join(name)} is closed already")
        return attrs.evolve(state, closed=True, replacement=replacement)

    return repository.change(root, name, make)


def reopen(root: Path, name: StreamName) -> Stream:
    """Open a closed stream again; its replacement is forgotten.

    Raises:
        NotFoundError: There is no such stream.
        RepositoryConflictError: It is open.
        RepositoryError: It could not be written; nothing changed.
    """

    def make(_package: Package, present: Stream | None) -> Stream:
        state = _existing(name, present)
        if not state.closed:
            raise RepositoryConflictError(f"{'/'.join(name)} is open")
        return attrs.evolve(state, closed=False, replacement=None)

    return repository.change(root, name, make)


def _existing(name: StreamName, present: Stream | None) -> Stream:
    if present is None:
        raise NotFoundError(f"there is no stream {'/'.join(name)}")
    return present


def sample(root: Path, now: datetime) -> None:
    """Put a package with two streams into an empty repository, to be looked at and replaced.

    Raises:
        RepositoryError: It could not be written.
    """
    title = "Sensor node"
    repository.write_package(root, "sensor-node", Package(title=title, poll_s=86_400))
    for stream, version in (("stable", "1.0.0"), ("edge", "1.1.0-rc1")):
        archives = tuple(_sample_archive(version, board) for board in ("nrf52840dk", "nrf9160dk"))
        repository.change(root, ("sensor-node", stream), _first(version, now, archives))


def _first(
    version: str, now: datetime, archives: tuple[Archive, ...]
) -> Callable[[Package, Stream | None], Stream]:
    state = Stream(version=version, sequence=1, published=now, archives=archives)
    return lambda _package, _present: state


def _sample_archive(version: str, board: str) -> Archive:
    image = f"a stand-in for sensor-node {version}, {board}".encode()
    url = f"https://updates.example.com/sensor-node/{version}/{board}.bin"
    return Archive(
        name=board,
        envelope=Envelope(
            type=DEFAULT_MEDIA_TYPE, size=len(image), sha256=hashlib.sha256(image).digest()
        ),
        content=Content(type="zephyr-image", arch="arm", machine=board, debug=False),
        offers=(Offer(url=url, metric=DEFAULT_METRIC),),
    )
