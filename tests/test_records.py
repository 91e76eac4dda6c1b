"""Records there and back, and what is made of JSON that fits badly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from besa.records import OMIT_EMPTY, MisfitError, from_json, to_json


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
    rare: tuple[int, ...] = field(default=(), metadata=OMIT_EMPTY)


WHOLE = Whole(
    share=0.5,
    parts=(Part(name="a", counts=(1, 2)), Part(name="b")),
    first=Part(name="c"),
    versions={"torch": "2"},
    settings={"seed": 0, "include": None, "texts": ["x"]},
    done=True,
)


def test_there_and_back():
    found = to_json(WHOLE)
    assert found["parts"] == [{"name": "a", "counts": [1, 2]}, {"name": "b", "counts": []}]
    assert from_json(Whole, found) == WHOLE


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
    assert from_json(Whole, {"share": 0.5, key: value}) == Whole(share=0.5)


def test_unknown_keys_are_passed_over():
    assert from_json(Whole, {"share": 0.5, "of another program": 1}) == Whole(share=0.5)


@pytest.mark.parametrize("found", [{}, {"share": "0.5"}, {"share": True}, {"share": None}])
def test_what_a_record_cannot_do_without(found: dict[str, Any]):
    with pytest.raises(MisfitError, match="'share'"):
        from_json(Whole, found)


@pytest.mark.parametrize("found", [None, [], "text", 1])
def test_a_record_is_an_object(found: Any):
    with pytest.raises(MisfitError, match="JSON object"):
        from_json(Whole, found)
