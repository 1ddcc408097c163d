"""What a device says about itself, and what of a stream suits it."""

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
    """Return the text that an attribute's value is compared by: `true`, `512`, or itself."""
    return str(value).lower() if type(value) is bool else str(value)


@attrs.frozen
class Selection:
    """What a device says about itself to narrow a stream.

    Attributes:
        attributes: Attribute and the text forms that suit, first preferred; in the order of
            narrowing (the six of content, then free ones by name).
        schemes: Of the offers that the device can use, lower case; empty: any.
    """

    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    schemes: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        # Each character of a text would count as a value, and nothing would suit.
        values = (self.schemes, *(texts for _, texts in self.attributes))
        if not all(isinstance(texts, tuple) for texts in values):
            raise TypeError("use Selection.of({name: value or values}), also for schemes")

    @classmethod
    def of(cls, wanted: Mapping[str, SelectionValue]) -> Selection:
        """Build a selection from attribute to one value or several, first preferred.

        Args:
            wanted: `scheme` stands for the schemes of offers; `name`, `sequence`, `head` and
                `full` are no attributes and left out.
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
        """Keep what suits the device, the preferred first.

        Args:
            archives: In any order.
            request_scheme: What a relative offer counts as.

        Returns:
            Archives ordered by the ranks of the values given (an archive that does not say an
            attribute comes after all that do), then by name; their offers by metric.

        Source: rules W-20 to W-24.
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
        """Leave out what makes no difference, so that selections that narrow alike are equal.

        Args:
            vocabulary: Attributes and `scheme`, and their texts, of all archives to be narrowed.
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
    """Archives, prepared to be narrowed again and again.

    Attributes:
        archives: Their offers in order, the best first.
        request_scheme: What a relative offer counts as.
        vocabulary: Attributes that archives say, and `scheme` of their offers; their texts; for
            each text the archives that say it, a bit each.
        saying: Attributes, and the archives that say any of their texts.
    """

    archives: tuple[Archive, ...]
    request_scheme: str
    vocabulary: Mapping[str, Mapping[str, int]]
    saying: Mapping[str, int]

    @classmethod
    def of(cls, archives: tuple[Archive, ...], request_scheme: str) -> Index:
        """Look at each archive once."""
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
        """Return what `Selection.narrow` does, without looking at what cannot suit."""
        suiting = (1 << len(self.archives)) - 1
        for attribute, texts in selection.attributes:
            said = self.vocabulary.get(attribute, {})
            # An archive says one text at the most, so the bits of two have none in common.
            suiting &= ~self.saying.get(attribute, 0) | sum(said.get(text, 0) for text in texts)
        return selection.narrow(self._chosen(suiting), self.request_scheme)

    def _chosen(self, bits: int) -> Iterator[Archive]:
        while bits:
            lowest = bits & -bits
            yield self.archives[lowest.bit_length() - 1]
            bits ^= lowest


def _each(values: SelectionValue) -> Iterable[AttributeValue]:
    return (values,) if isinstance(values, str | int) else values


def suits(archive: Archive, selection: Selection, request_scheme: str = "coap") -> bool:
    """Tell whether a device of this selection can use the archive."""
    return bool(selection.narrow((archive,), request_scheme))


def preferred(
    archives: Iterable[Archive], selection: Selection, request_scheme: str = "coap"
) -> Archive | None:
    """Return the archive that a device of this selection prefers, or None if none suits."""
    return next(iter(selection.narrow(archives, request_scheme)), None)
