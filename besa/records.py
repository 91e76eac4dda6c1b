"""Records: dataclasses that are kept as JSON, and read again whoever wrote it.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Figure:
    ...     name: str
    ...     values: tuple[float, ...] = ()
    >>> to_json(Figure("loss", (0.5, 0.25)))
    {'name': 'loss', 'values': [0.5, 0.25]}
    >>> from_json(Figure, {"name": "loss", "values": "damaged", "unit": "nats"})
    Figure(name='loss', values=())

Only the types that JSON has are known: text, numbers, booleans, None, `tuple[X, ...]`,
`dict[str, X]`, and records within records. A library that validates would also do; these few lines
say what a reader here must bear, which is a file of another program or of another version of besa.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Record = TypeVar("Record", bound=DataclassInstance)
else:
    Record = TypeVar("Record")

# For `field(metadata=...)`: JSON has the key only where the value is not empty.
OMIT_EMPTY = {"omit_empty": True}

_SCALARS: dict[Any, type | tuple[type, ...]] = {str: str, int: int, float: (int, float)}


class MisfitError(ValueError):
    """JSON that is no record of the kind that was asked for."""


def to_json(record: DataclassInstance) -> dict[str, Any]:
    """The record as a JSON object: a key for each field, in the order of the fields."""
    return {
        field.name: _to_json(value)
        for field in fields(record)
        if (value := getattr(record, field.name)) or not field.metadata.get("omit_empty")
    }


def from_json(kind: type[Record], found: object) -> Record:
    """The record of `kind` that a JSON object holds.

    Keys that `kind` does not know are passed over. A field whose key is missing, or whose value is
    of another type, gets its default.

    Raises:
        MisfitError: `found` is no object, or has no proper value for a field without a default.
    """
    if not isinstance(found, dict):
        raise MisfitError(f"a {kind.__name__} is a JSON object, not {type(found).__name__}")
    values = {}
    for field, hint in _typed_fields(kind):
        if field.name in found:
            try:
                values[field.name] = _from_json(hint, found[field.name])
                continue
            except MisfitError:
                pass
        if field.default is MISSING and field.default_factory is MISSING:
            raise MisfitError(f"a {kind.__name__} needs a proper {field.name!r}")
    return kind(**values)


@cache
def _typed_fields(kind: type[DataclassInstance]) -> list[tuple[Field[Any], Any]]:
    """The fields of a record, each with its resolved type."""
    hints = get_type_hints(kind)
    return [(field, hints[field.name]) for field in fields(kind)]


def _to_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    return value


def _from_json(hint: Any, value: Any) -> Any:
    """`value` as the type `hint` has it; MisfitError where it is of another."""
    if hint is Any:
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _from_json_union(arguments, value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_from_json(arguments[0], entry) for entry in value)
    if origin is dict and isinstance(value, dict):
        return {key: _from_json(arguments[1], entry) for key, entry in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    # True is an int to Python, but no number.
    if hint in _SCALARS and isinstance(value, _SCALARS[hint]) and not isinstance(value, bool):
        return value
    raise MisfitError(f"{type(value).__name__} where {hint} should be")


def _from_json_union(kinds: tuple[Any, ...], value: Any) -> Any:
    if value is None and NoneType in kinds:
        return None
    for kind in kinds:
        if kind is not NoneType:
            try:
                return _from_json(kind, value)
            except MisfitError:
                continue
    raise MisfitError(f"{type(value).__name__} is none of {kinds}")
