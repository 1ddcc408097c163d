"""Tables of fields that convert values of the model to plain data and back, strictly.

A class has one `Table`, whose rows drive every format in both directions; `documents.py` and
`release_file.py` define them. A decoding error lists all broken rules with their places.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import attrs

from netota_coap.encoding.codecs import Format, refuse
from netota_coap.errors import InvalidDataError, Issue
from netota_coap.model.values import LIMITS, Value, issues_of

V = TypeVar("V", bound=Value)


class Form:
    """Converts a value to each format and back; this base class leaves it as it is."""

    def encode(self, value: Any, _format: Format) -> Any:
        """Return plain data for a value of the model."""
        return value

    def decode(self, plain: Any, _format: Format) -> Any:
        """Return the value; the model's rule refuses a value of the wrong type later.

        Raises:
            InvalidDataError: The data is malformed. Places are relative to this value.
        """
        return plain


SAME = Form()


@attrs.frozen
class One(Form):
    """One value, by its table."""

    table: Table[Any]

    def encode(self, value: Value, fmt: Format) -> Any:
        """Encode with the table."""
        return self.table.to_plain(value, fmt)

    def decode(self, plain: Any, fmt: Format) -> Any:
        """Decode with the table."""
        return self.table.from_plain(plain, fmt)


@attrs.frozen
class Many(Form):
    """An array of values by their table, no longer than a row of `LIMITS` allows."""

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


# A hostile file can have a million keys, and one of a million characters.
_SHOWN_UNKNOWN = 20
_SHOWN_KEY = 64


@attrs.frozen
class Field:
    """One field of a class in all formats.

    Attributes:
        name: The attribute, and the key in TOML and JSON.
        key: The key in CBOR; None: CBOR has no such field.
        formats: The formats that have the field.
        required: The formats that require it.
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
        noun: The class's name in errors.
        fields: The fields, in the order of TOML and JSON.
        free: The attribute that takes entries whose keys no field has, or None.
        array: Whether CBOR writes the values in the order of their keys, without the keys.
        by_key: The fields of each format by their keys.
    """

    cls: type[V]
    noun: str
    fields: tuple[Field, ...]
    free: str | None = None
    array: bool = False
    by_key: dict[Format, dict[Any, Field]] = attrs.field(init=False)
    _required: dict[Format, tuple[str, ...]] = attrs.field(init=False)
    _defaults: dict[str, Any] = attrs.field(init=False)

    @by_key.default
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

    def to_plain(self, value: V, fmt: Format) -> Any:
        """Return plain data for a value."""
        plain: dict[Any, Any] = {}
        for key, field in self.by_key[fmt].items():
            item = getattr(value, field.name)
            if fmt in field.required or item != self._defaults[field.name]:
                plain[key] = field.form.encode(item, fmt)
        if fmt is Format.CBOR and self.array:
            return [plain[key] for key in sorted(plain)]
        if self.free:
            plain |= getattr(value, self.free)
        return plain

    def from_plain(self, plain: Any, fmt: Format, **given: Any) -> V:
        """Return the value of plain data; `given` are fields that are not in the data.

        Unknown keys are errors in TOML (except `x-…`), and are skipped in CBOR and JSON.

        Raises:
            InvalidDataError: The data breaks rules. All are listed.
        """
        if fmt is Format.CBOR and self.array and type(plain) is list:
            # Elements beyond the known ones are skipped, as unknown keys are.
            plain = dict(enumerate(plain))
        elif type(plain) is not dict or (fmt is Format.CBOR and self.array):
            shape = "an array" if fmt is Format.CBOR and self.array else "a table"
            raise refuse(f"{self.noun} must be {shape}")
        by_key = self.by_key[fmt]
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
                        raise refuse("must not be null; leave the key out")
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
