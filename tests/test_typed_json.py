"""Dataclasses as JSON and back, strictly and leniently."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from besa.typed_json import ABSENT_IF_DEFAULT, ShapeError, from_json, to_json


@dataclass(frozen=True)
class Inner:
    size: float
    name: str | None = field(default=None, metadata=ABSENT_IF_DEFAULT)


@dataclass(frozen=True)
class Outer:
    count: int
    inner: dict[str, Inner]
    either: Inner | str = ""
    labels: tuple[str, ...] = ()


def test_what_json_cannot_hold() -> None:
    assert to_json(Inner(math.inf)) == {"size": None}
    assert math.isnan(from_json(Inner, {"size": None}).size)


def test_unions_and_nesting() -> None:
    outer = Outer(1, {"a": Inner(0.5, "x")}, Inner(2.0), ("l",))
    assert from_json(Outer, to_json(outer)) == outer
    assert from_json(Outer, {**to_json(outer), "either": "text", "later": 1}).either == "text"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "the file is \\[\\], not Outer"),
        ({"inner": {}}, "count is missing"),
        ({"count": True, "inner": {}}, "count is True, not int"),
        ({"count": 1.5, "inner": {}}, "count is 1.5, not int"),
        ({"count": 1, "inner": []}, "inner is \\[\\], not dict"),
        ({"count": 1, "inner": {"a": {"size": "1"}}}, "inner.a.size is '1', not float"),
        ({"count": 1, "inner": {}, "labels": ["a", 2]}, r"labels\[1\] is 2, not str"),
        ({"count": 1, "inner": {}, "either": 3}, "either is 3, not str"),
    ],
)
def test_what_does_not_fit_is_named(found: object, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        from_json(Outer, found)


# ------------------------------------------------------------------------------ lenient


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Whole:
    share: float
    parts: tuple[Part, ...] = ()
    first: Part | None = None
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    rare: tuple[int, ...] = field(default=(), metadata=ABSENT_IF_DEFAULT)


WHOLE = Whole(
    share=0.5,
    parts=(Part(name="a", counts=(1, 2)), Part(name="b")),
    first=Part(name="c"),
    versions={"torch": "2"},
    settings={"seed": 0, "include": None, "texts": ["x"]},
    done=True,
)


def test_there_and_back() -> None:
    found = to_json(WHOLE)
    assert found["parts"] == [{"name": "a", "counts": [1, 2]}, {"name": "b", "counts": []}]
    assert from_json(Whole, found) == from_json(Whole, found, lenient=True) == WHOLE


def test_a_key_that_may_be_omitted():
    assert "rare" not in to_json(WHOLE)
    assert to_json(Whole(share=1.0, rare=(3,)))["rare"] == [3]


@pytest.mark.parametrize("share", [1, 0.25, float("inf")])
def test_any_number_is_a_float(share: float):
    assert from_json(Whole, {"share": share}).share == share


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parts", "text"),
        ("parts", [{"name": "a"}, {"counts": [1]}]),
        ("parts", {"name": "a"}),
        ("first", []),
        ("versions", {"torch": 2}),
        ("settings", None),
        ("done", 1),
        ("done", "yes"),
    ],
)
def test_what_is_damaged_counts_as_missing(key: str, value: Any):
    assert from_json(Whole, {"share": 0.5, key: value}, lenient=True) == Whole(share=0.5)


def test_unknown_keys_are_passed_over():
    assert from_json(Whole, {"share": 0.5, "of another program": 1}, lenient=True) == Whole(
        share=0.5
    )


@pytest.mark.parametrize("found", [{}, {"share": "0.5"}, {"share": True}, {"share": None}])
def test_what_a_record_cannot_do_without(found: dict[str, Any]):
    with pytest.raises(ShapeError, match="share is"):
        from_json(Whole, found, lenient=True)


@pytest.mark.parametrize("found", [None, [], "text", 1])
def test_a_record_is_an_object(found: Any):
    with pytest.raises(ShapeError, match="not Whole"):
        from_json(Whole, found, lenient=True)
