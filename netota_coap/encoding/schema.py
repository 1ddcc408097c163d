"""The engine of the tables of fields: values of the model to plain data and back, strictly.

A class has one `Table`, whose rows drive every format in both directions; which tables there are
is `wire.py`'s and `release.py`'s matter. Decoding lists everything that is wrong, each with its
place.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import attrs

from netota_coap.encoding.codecs import Format, refuse
from netota_coap.errors import InvalidDataError, Issue
from netota_coap.model.values import LIMITS, Value, issues_of

V = TypeVar("V", bound=Value)

# ----------------------------------------------------------------------------------------------
# Forms: how one value looks in each format


class Form:
    """How a value looks in each format; this one: the same in all of them."""

    def encode(self, value: Any, _format: Format) -> Any:
        """Return the plain data that stands for a value of the model."""
        return value

    def decode(self, plain: Any, _format: Format) -> Any:
        """Return the value; what is not of its shape is left for the model's rule to refuse.

        Raises:
            InvalidDataError: With places relative to this value.
        """
        return plain


SAME = Form()


@attrs.frozen
class One(Form):
    """One value of the class of a table."""

    table: Table[Any]

    def encode(self, value: Value, fmt: Format) -> Any:
        """Encode with the table."""
        return self.table.to_plain(value, fmt)

    def decode(self, plain: Any, fmt: Format) -> Any:
        """Decode with the table."""
        return self.table.from_plain(plain, fmt)


@attrs.frozen
class Many(Form):
    """An array of values of the class of a table, as many as a row of `LIMITS` allows."""

    table: Table[Any]
    limit: str

    def encode(self, value: tuple[Value, ...], fmt: Format) -> Any:
        """Encode with the table."""
        return [self.table.to_plain(item, fmt) for item in value]

    def decode(self, plain: Any, fmt: Format) -> Any:
        """Decode with the table."""
        if type(plain) is not list:
            raise refuse("must be an array")
        bound = LIMITS[self.limit]
        if len(plain) > bound.value:
            raise refuse(f"must be at most {bound.value} {bound.unit}, not {len(plain)}")
        values, issues = [], []
        for index, item in enumerate(plain):
            try:
                values.append(self.table.from_plain(item, fmt))
            except InvalidDataError as error:
                issues += [issue.inside(f"[{index}]") for issue in error.issues]
        if issues:
            raise InvalidDataError(issues)
        return tuple(values)


# ----------------------------------------------------------------------------------------------
# Tables

# A hostile file can have a million keys, and one of a million characters.
_SHOWN_UNKNOWN = 20
_SHOWN_KEY = 64


@attrs.frozen
class Field:
    """One field of a class in all formats.

    Attributes:
        name: Of the attribute, and in TOML and JSON.
        key: In CBOR; None: not there.
        form: How its value looks.
        formats: Where it stands at all.
        required: Where it must stand.
    """

    name: str
    key: int | None
    form: Form = SAME
    formats: frozenset[Format] = frozenset(Format)
    required: frozenset[Format] = frozenset()


@attrs.frozen(eq=False)
class Table(Generic[V]):
    """The fields of a class.

    Attributes:
        cls: The class.
        noun: What the class is called in errors.
        fields: In the order in which TOML and JSON show them.
        free: Attribute that holds the entries of a map that no field names, or None.
        array: Whether CBOR writes the values in the order of their keys, without the keys.
    """

    cls: type[V]
    noun: str
    fields: tuple[Field, ...]
    free: str | None = None
    array: bool = False
    _by_key: dict[Format, dict[Any, Field]] = attrs.field(init=False)
    _required: dict[Format, tuple[str, ...]] = attrs.field(init=False)
    _defaults: dict[str, Any] = attrs.field(init=False)

    @_by_key.default
    def _fields_by_key(self) -> dict[Format, dict[Any, Field]]:
        return {
            fmt: {
                field.key if fmt is Format.CBOR else field.name: field
                for field in self.fields
                if fmt in field.formats
            }
            for fmt in Format
        }

    @_required.default
    def _required_names(self) -> dict[Format, tuple[str, ...]]:
        return {fmt: tuple(f.name for f in self.fields if fmt in f.required) for fmt in Format}

    @_defaults.default
    def _defaults_of_class(self) -> dict[str, Any]:
        return {field.name: field.default for field in attrs.fields(self.cls)}

    def by_key(self, fmt: Format) -> dict[Any, Field]:
        """Return the fields by what a map of the format calls them."""
        return self._by_key[fmt]

    def to_plain(self, value: V, fmt: Format) -> Any:
        """Return the plain data that stands for a value."""
        plain: dict[Any, Any] = {}
        for key, field in self._by_key[fmt].items():
            item = getattr(value, field.name)
            if fmt in field.required or item != self._defaults[field.name]:
                plain[key] = field.form.encode(item, fmt)
        if fmt is Format.CBOR and self.array:
            return [plain[key] for key in sorted(plain)]
        if self.free:
            plain |= getattr(value, self.free)
        return plain

    def from_plain(self, plain: Any, fmt: Format, **given: Any) -> V:
        """Return the value that plain data stands for.

        Args:
            plain: Of any type.
            fmt: Unknown keys are errors in TOML (except `x-…`), and skipped in CBOR and JSON.
            given: Fields that do not stand in it.

        Raises:
            InvalidDataError: With everything that is wrong.
        """
        if fmt is Format.CBOR and self.array and type(plain) is list:
            # Elements beyond the known ones are skipped, as unknown keys are.
            plain = dict(enumerate(plain))
        elif type(plain) is not dict or (fmt is Format.CBOR and self.array):
            shape = "an array" if fmt is Format.CBOR and self.array else "a table"
            raise refuse(f"{self.noun} must be {shape}")
        by_key = self._by_key[fmt]
        issues: list[Issue] = []
        values: dict[str, Any] = given
        free: dict[str, Any] = {}
        unknown = 0
        failed = set()
        for key, item in plain.items():
            # True equals 1 for a dict, so the type decides first.
            field = by_key.get(key) if type(key) in (int, str) else None
            if field is not None:
                try:
                    if item is None:
                        raise refuse("must not be null: what is not said is left out")
                    values[field.name] = field.form.decode(item, fmt)
                except InvalidDataError as error:
                    failed.add(field.name)
                    issues += [issue.inside(field.name) for issue in error.issues]
            elif type(key) is str and not key.startswith("x-"):
                if self.free:
                    free[key] = item
                elif fmt is Format.TOML:
                    unknown += 1
                    if unknown <= _SHOWN_UNKNOWN:
                        known = ", ".join(by_key)
                        reason = f"unknown key; {self.noun} has {known}"
                        issues.append(Issue(key[:_SHOWN_KEY], reason))
        if unknown > _SHOWN_UNKNOWN:
            issues.append(Issue("", f"{unknown - _SHOWN_UNKNOWN} more unknown keys"))
        if self.free and free:
            values[self.free] = free
        issues += [
            Issue(name, "missing")
            for name in self._required[fmt]
            if name not in values and name not in failed
        ]
        if not issues:
            return self.cls(**values)
        raise InvalidDataError(issues + issues_of(self.cls, values))
