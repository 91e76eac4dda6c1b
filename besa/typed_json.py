"""Dataclasses as JSON, and back: the file's keys are the fields' names, in their order.

JSON has no infinity and no NaN: both are written as null, and null is read as NaN where a float has
to be. A field with the metadata `ABSENT_IF_DEFAULT` leaves its key out where it says nothing.

>>> from dataclasses import dataclass, field
>>> @dataclass(frozen=True)
... class Point:
...     x: float
...     labels: tuple[str, ...] = ()
...     note: str | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
>>> to_json(Point(1.5, ("a",)))
{'x': 1.5, 'labels': ['a']}
>>> from_json(Point, {"x": 2, "labels": []})
Point(x=2, labels=(), note=None)
>>> from_json(Point, {"x": 2, "labels": "damaged"}, lenient=True)
Point(x=2, labels=(), note=None)

A library that validates would do as well; this is what the records of besa need of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

ABSENT_IF_DEFAULT = {"absent_if_default": True}


class ShapeError(ValueError):
    """JSON that does not fit the dataclass; the message names the place."""


def to_json(value: Any) -> Any:
    """A dataclass, or what its fields hold, as `json.dump` takes it."""
    if is_dataclass(value):
        return {
            each.name: to_json(found)
            for each in fields(value)
            if (found := getattr(value, each.name)) != _default(each)
            or each.metadata != ABSENT_IF_DEFAULT
        }
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: to_json(each) for key, each in value.items()}
    return [to_json(each) for each in value] if isinstance(value, list | tuple) else value


def _default(field: Field[Any]) -> Any:
    """What a field holds that was not given."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def from_json(kind: type[T], value: Any, *, lenient: bool = False) -> T:
    """The dataclass that the JSON stands for; keys that it has no field for are left out.

    Args:
        lenient: a value of another type counts as missing, in nested dataclasses too. For files
            that another program may have written, or another version of besa.

    Raises:
        ShapeError: a key without which it cannot be is missing, or a value is of another type.
    """
    found: T = _decode(kind, value, "", lenient)
    return found


def _decode(kind: Any, value: Any, place: str, lenient: bool) -> Any:
    if kind is Any:
        return value
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        kinds = [each for each in inner if each is not NoneType]
        return _decode_one_of(kinds, value, place, lenient)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, place, lenient)
    if origin is dict and isinstance(value, dict):
        return {
            key: _decode(inner[1], each, f"{place}.{key}", lenient) for key, each in value.items()
        }
    if origin is tuple and isinstance(value, list):
        return tuple(
            _decode(inner[0], each, f"{place}[{i}]", lenient) for i, each in enumerate(value)
        )
    if kind is float and value is None and not lenient:
        return math.nan
    allowed = (int, float) if kind is float else origin or kind
    if isinstance(value, allowed) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ShapeError(f"{place} is {value!r}, not {getattr(kind, '__name__', kind)}")


def _decode_one_of(kinds: list[Any], value: Any, place: str, lenient: bool) -> Any:
    """The first of the kinds that the value fits."""
    for kind in kinds[:-1]:
        with suppress(ShapeError):
            return _decode(kind, value, place, lenient)
    return _decode(kinds[-1], value, place, lenient)


def _decode_dataclass(kind: Any, value: Any, place: str, lenient: bool) -> Any:
    if not isinstance(value, dict):
        raise ShapeError(f"{place or 'the file'} is {value!r}, not {kind.__name__}")
    hints, found = _hints(kind), {}
    for each in fields(kind):
        where = f"{place}.{each.name}".removeprefix(".")
        needed = each.default is MISSING and each.default_factory is MISSING
        if each.name not in value:
            if needed:
                raise ShapeError(f"{where} is missing")
            continue
        try:
            found[each.name] = _decode(hints[each.name], value[each.name], where, lenient)
        except ShapeError:
            if needed or not lenient:
                raise
    return kind(**found)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
