"""Makes the archives of one version from files and what a publisher says about them.

Source: `spec/publishing.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import attrs

from netota_coap.errors import InvalidDataError, Issue
from netota_coap.files import Progress
from netota_coap.model.selection import text_form
from netota_coap.model.values import (
    CONTENT_ATTRIBUTES,
    LIMITS,
    URL_METRIC,
    Archive,
    AttributeValue,
    Content,
    Envelope,
    Offer,
    Stream,
    StreamName,
    clashes,
    name_rule,
    optional,
)
from netota_coap.publishing import inspection
from netota_coap.publishing.inspection import versions_differ as _differ
from netota_coap.publishing.inspection.artefact import Artefact


@attrs.frozen
class ArchiveSource:
    """A file to be published, and what the publisher says about it, which overrides the file.

    Attributes:
        name: A template, as in offers; None: chosen by rule P-23.
        media_type: None: as the file tells.
        offers: Templates, instead of those for all archives.
    """

    path: Path
    name: str | None = None
    media_type: str | None = None
    content: Content = Content()
    offers: tuple[Offer, ...] = ()

    @classmethod
    def parse(cls, text: str) -> ArchiveSource:
        """Read `FILE[,name=…,media-type=…,ATTRIBUTE=VALUE…]`.

        The value of a free attribute is boolean (`true`, `false`), integer (digits) or text.

        Raises:
            InvalidDataError: It is not of that form or breaks a rule of the model.
        """
        file, *settings = text.split(",")
        given: dict[str, str] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or key in given:
                reason = "appears twice" if equals else "must be KEY=VALUE"
                hint = "" if equals else "A path with a comma in it goes into a release file."
                raise InvalidDataError([Issue(setting, reason, file)], hint=hint)
            given[key] = value
        name, media_type = given.pop("name", None), given.pop("media-type", None)
        own = {key: _value(given.pop(key), key) for key in CONTENT_ATTRIBUTES if key in given}
        free = {key: _value(value) for key, value in given.items()}
        reasons = {
            "name": name_rule(name) if name is not None and "{" not in name else None,
            "media-type": optional(Envelope.rules()["type"])(media_type),
        }
        issues = [Issue(place, reason, file) for place, reason in reasons.items() if reason]
        try:
            content = Content(**own, attributes=free)  # type: ignore[arg-type]
        except InvalidDataError as error:
            raise InvalidDataError(
                [*issues, *(attrs.evolve(issue, file=file) for issue in error.issues)]
            ) from error
        if issues:
            raise InvalidDataError(issues)
        return cls(Path(file), name, media_type, content)


def _value(text: str, attribute: str = "") -> AttributeValue:
    if text in ("true", "false") and attribute in ("", "debug"):
        return text == "true"
    if attribute == "" and _is_number(text):
        return int(text)
    return text


def _is_number(text: str) -> bool:
    # Python refuses to parse thousands of digits; as text they are refused for their length.
    # A leading zero indicates text: a serial number, a date.
    shaped = text.isascii() and text.isdecimal() and (text == "0" or text[0] != "0")
    return shaped and len(text) <= LIMITS["text"].value


def parse_offer(text: str) -> Offer:
    """Read `URL[,METRIC]`.

    Raises:
        InvalidDataError: It breaks a rule of offers.
    """
    url, comma, metric = text.rpartition(",")
    if comma and _is_number(metric):
        return Offer(url=url, metric=int(metric))
    return Offer(url=text, metric=URL_METRIC)


@attrs.frozen
class _Build:
    """A file that was read, and what the publisher says about it."""

    source: ArchiveSource
    artefact: Artefact
    content: Content

    @classmethod
    def read(cls, source: ArchiveSource, progress: Progress) -> _Build:
        artefact = inspection.read(source.path, progress)
        told, said = artefact.content, source.content
        merged = told.all() | said.all()
        own = {name: merged.pop(name) for name in CONTENT_ATTRIBUTES if name in merged}
        return cls(source, artefact, Content(**own, attributes=merged))  # type: ignore[arg-type]

    @property
    def file(self) -> str:
        return str(self.source.path)

    def contradictions(self, version: str) -> Iterator[Issue]:
        """Report where the publisher contradicts what the file itself states."""
        told = self.artefact.content
        for attribute in sorted(self.artefact.stated & set(CONTENT_ATTRIBUTES)):
            said = self.source.content.get(attribute)
            if said is not None and said != told.get(attribute):
                reason = f"is {told.get(attribute)} in the file, not {said}"
                yield Issue(attribute, reason, self.file)
        stated = self.artefact.version
        if stated and "version" in self.artefact.stated and _differ(stated, version):
            yield Issue("version", f"is {stated} in the file, not {version}", self.file)

    def archive(self, names: Mapping[str, str], templates: Sequence[Offer]) -> Archive:
        """Describe the file; templates can use `names` besides those of the archive."""
        said = {name: text_form(value) for name, value in self.content.all().items()}
        envelope = self.artefact.envelope
        if self.source.media_type is not None:
            envelope = attrs.evolve(envelope, type=self.source.media_type)
        names = {**said, **names, "file": self.source.path.name, "stem": self.source.path.stem}
        names["sha256"] = envelope.sha256.hex()
        try:
            template = self.source.name
            name = self._name() if template is None else _fill(template, names, "name")
            filled = tuple(
                attrs.evolve(offer, url=_fill(offer.url, names | {"name": name}, "url"))
                for offer in self.source.offers or templates
            )
            return Archive(name=name, envelope=envelope, content=self.content, offers=filled)
        except InvalidDataError as error:
            issues = [attrs.evolve(issue, file=self.file) for issue in error.issues]
            hint = _NAME_HINT if issues[0].place == "name" else ""
            raise InvalidDataError(issues, hint=hint) from error

    def _name(self) -> str:
        if "zephyr" in self.artefact.facts and self.content.machine:
            return self.content.machine + ("-debug" if self.content.debug else "")
        return self.source.path.stem


_NAME_HINT = "Give it a name: --archive FILE,name=NAME, or name in a release file."
_PLACE = re.compile(r"\{([^{}]*)\}|[{}]")


def _fill(template: str, names: Mapping[str, str], place: str) -> str:
    def filling(match: re.Match[str]) -> str:
        value = names.get(match[1] or "")
        if value is None:
            known = ", ".join(f"{{{name}}}" for name in sorted(names))
            raise InvalidDataError([Issue(place, f"{template!r}: the templates are {known}")])
        return quote(value, safe="") if place == "url" else value

    return _PLACE.sub(filling, template)


def describe(
    sources: Sequence[ArchiveSource],
    name: StreamName,
    version: str | None,
    templates: Sequence[Offer],
    *,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> tuple[str, tuple[Archive, ...]]:
    """Read files, and describe them as the archives of one version, in their order.

    Args:
        sources: One per archive.
        name: The stream's, for templates.
        version: None: as the files tell.
        templates: Offers for each archive that has none of its own.
        force: Whether the publisher may contradict what the files state.
        progress: Called with each number of bytes read.

    Raises:
        InvalidDataError: A file cannot be read, or something breaks a rule or contradicts another.
    """
    # Reading files may take long, so what can be checked without them is checked first.
    reason = Stream.rules()["version"](version) if version is not None else None
    issues = [Issue("version", reason)] if reason else []
    given = (source.name for source in sources if source.name and "{" not in source.name)
    issues += clashes(given, "--archive {name}")
    if issues:
        raise InvalidDataError(issues)
    builds = [_Build.read(source, progress) for source in sources]
    version = version if version is not None else _told_version(builds)
    if not force:
        _refuse_contradictions(builds, version)
    names = {"package": name[0], "stream": name[1], "version": version}
    archives = tuple(build.archive(names, templates) for build in builds)
    issues = clashes((archive.name for archive in archives), "--archive {name}")
    issues += _shared_urls(archives)
    if issues:
        hint = _NAME_HINT if clashes(archive.name for archive in archives) else ""
        raise InvalidDataError(issues, hint=hint)
    return version, archives


def _told_version(builds: Sequence[_Build]) -> str:
    """Return the version that the files agree on."""
    told = [build for build in builds if build.artefact.version]
    if not told:
        hints = [str(h) for build in builds if (h := build.artefact.facts.get("hint"))]
        raise InvalidDataError(
            [Issue("version", "must be given: no file tells it")], hint=" ".join(hints[:1])
        )
    first = told[0].artefact.version or ""
    issues: list[Issue] = []
    for build in told:
        if _differ(other := build.artefact.version or "", first):
            reason = f"is {other}, but {told[0].file} has {first}"
            issues.append(Issue("version", reason, build.file))
    if issues:
        hint = "All archives of a stream have the same version: the same source, other builds."
        raise InvalidDataError(issues, hint=hint)
    return first


def _refuse_contradictions(builds: Sequence[_Build], version: str) -> None:
    issues = [issue for build in builds for issue in build.contradictions(version)]
    if issues:
        raise InvalidDataError(issues, hint="If that is meant, give --force.")


def _shared_urls(archives: Iterable[Archive]) -> Iterator[Issue]:
    """Report URLs that two different files share."""
    seen: dict[str, Archive] = {}
    for archive in archives:
        for offer in archive.offers:
            other = seen.setdefault(offer.url, archive)
            if other.envelope.sha256 != archive.envelope.sha256:
                reason = f"offers {offer.url}, as {other.name} does, but is another file"
                yield Issue(archive.name, reason)
