"""What a device says about itself, and which archives of a stream suit it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import attrs

from netota_coap.model.values import (
    CONTENT_ATTRIBUTES,
    RESERVED_ATTRIBUTES,
    Archive,
    AttributeValue,
    Content,
    Offer,
)

SelectionValue = AttributeValue | Iterable[AttributeValue]


def text_form(value: AttributeValue) -> str:
    """Return an attribute's value as the text that it is compared by, such as `true` or `512`."""
    return str(value).lower() if type(value) is bool else str(value)


@attrs.frozen
class Selection:
    """What a device says about itself to narrow a stream; made by `Selection.of`.

    Attributes:
        attributes: Pairs of an attribute and the text forms that suit, preferred first; in the
            order of narrowing: `CONTENT_ATTRIBUTES`, then free ones by name.
        schemes: Schemes that the device can download by, lower case; empty: any.
    """

    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    schemes: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        # Values of other shapes would silently select nothing.
        if not _are_sound(self.attributes, self.schemes):
            hint = "use Selection.of, as in Selection.of({'machine': 'nrf52840dk'})"
            raise TypeError(f"Selection() takes tuples of tuples of text; {hint}")

    @classmethod
    def of(cls, wanted: Mapping[str, SelectionValue]) -> Selection:
        """Make a selection from a map of attributes to one value or several, preferred first.

        Args:
            wanted: The key `scheme` has the schemes of offers; `name`, `sequence`, `head` and
                `full` are no attributes and are ignored.
        """
        texts = {
            name: tuple(dict.fromkeys(text_form(v) for v in _each(values)))
            for name, values in wanted.items()
        }
        schemes = tuple(dict.fromkeys(text.lower() for text in texts.get("scheme", ())))
        free = sorted(texts.keys() - RESERVED_ATTRIBUTES)
        order = (*CONTENT_ATTRIBUTES, *free)
        return cls(tuple((name, texts[name]) for name in order if texts.get(name)), schemes)

    def narrow(self, archives: Iterable[Archive], request_scheme: str) -> tuple[Archive, ...]:
        """Return the archives that suit the device, the preferred first.

        They are ordered by the ranks of their values (an archive without an attribute ranks below
        all that have it), then by name; their offers by metric. An offer that is a path has the
        scheme of the request. Source: rules W-20 to W-24.
        """
        ranked = []
        for archive in archives:
            rank = self._rank(archive.content)
            offers = self._offers(archive.offers, request_scheme)
            if rank is not None and (offers or not self.schemes):
                same = offers == archive.offers
                ranked.append((rank, archive if same else attrs.evolve(archive, offers=offers)))
        ranked.sort(key=lambda pair: (pair[0], pair[1].name))
        return tuple(archive for _, archive in ranked)

    def within(self, vocabulary: Mapping[str, Collection[str]]) -> Selection:
        """Drop values that no archive has, so that selections that narrow alike are equal.

        Args:
            vocabulary: Maps each attribute, and `scheme`, to its text forms in the archives.
        """
        attributes = tuple(
            (attribute, tuple(text for text in texts if text in vocabulary[attribute]))
            for attribute, texts in self.attributes
            if attribute in vocabulary
        )
        schemes = tuple(sorted(set(vocabulary.get("scheme", ())) & set(self.schemes)))
        return Selection(attributes, schemes or (self.schemes and ("",)))

    def _rank(self, content: Content) -> tuple[int, ...] | None:
        rank = []
        for attribute, texts in self.attributes:
            value = content.get(attribute)
            if value is None:
                rank.append(len(texts))
            elif (text := text_form(value)) in texts:
                rank.append(texts.index(text))
            else:
                return None
        return tuple(rank)

    def _offers(self, offers: tuple[Offer, ...], request_scheme: str) -> tuple[Offer, ...]:
        usable = (
            offer
            for offer in offers
            if not self.schemes or offer.scheme(request_scheme) in self.schemes
        )
        return tuple(sorted(usable, key=lambda offer: offer.metric))


@attrs.frozen(eq=False)
class Index:
    """An index for narrowing the same archives many times.

    Attributes:
        vocabulary: Maps attributes, and `scheme`, to their texts, and these to archives, as bits.
        saying: Maps attributes, and `scheme`, to the archives that have them; bit n is archive n.
    """

    archives: tuple[Archive, ...]
    request_scheme: str
    vocabulary: Mapping[str, Mapping[str, int]]
    saying: Mapping[str, int]

    @classmethod
    def of(cls, archives: tuple[Archive, ...], request_scheme: str) -> Index:
        """Index archives; an offer that is a path has the scheme of the request."""
        vocabulary: dict[str, dict[str, int]] = {}
        saying: dict[str, int] = {}

        def add(attribute: str, text: str, bit: int) -> None:
            texts = vocabulary.setdefault(attribute, {})
            texts[text] = texts.get(text, 0) | bit
            saying[attribute] = saying.get(attribute, 0) | bit

        for number, archive in enumerate(archives):
            for attribute, value in archive.content.all().items():
                add(attribute, text_form(value), 1 << number)
            for offer in archive.offers:
                add("scheme", offer.scheme(request_scheme), 1 << number)
        return cls(archives, request_scheme, vocabulary, saying)

    def narrow(self, selection: Selection) -> tuple[Archive, ...]:
        """Narrow like `Selection.narrow`, but look only at archives that can suit."""
        suiting = (1 << len(self.archives)) - 1
        for attribute, texts in selection.attributes:
            said = self.vocabulary.get(attribute, {})
            # An archive has at most one text per attribute, so no bit is in two of the texts.
            suiting &= ~self.saying.get(attribute, 0) | sum(said.get(text, 0) for text in texts)
        return selection.narrow(self._archives_of(suiting), self.request_scheme)

    def _archives_of(self, bits: int) -> Iterator[Archive]:
        while bits:
            lowest = bits & -bits
            yield self.archives[lowest.bit_length() - 1]
            bits ^= lowest


def _each(values: SelectionValue) -> Iterable[AttributeValue]:
    return (values,) if isinstance(values, str | int) else values


def _are_sound(attributes: object, schemes: object) -> bool:
    # Plain loops, because most requests make two selections and `all` takes three times as long.
    if type(attributes) is not tuple or type(schemes) is not tuple:
        return False
    for pair in attributes:
        if type(pair) is not tuple or len(pair) != 2 or type(pair[1]) is not tuple:
            return False
        for text in pair[1]:
            if type(text) is not str:
                return False
    return True


def suits(archive: Archive, selection: Selection, request_scheme: str = "coap") -> bool:
    """Return whether a device of this selection can use the archive."""
    return bool(selection.narrow((archive,), request_scheme))


def preferred(
    archives: Iterable[Archive], selection: Selection, request_scheme: str = "coap"
) -> Archive | None:
    """Return the archive that a device of this selection prefers; None if none suits."""
    return next(iter(selection.narrow(archives, request_scheme)), None)
