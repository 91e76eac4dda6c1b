"""results.json as a type: what was written by earlier versions is read, and written as it was."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from besa.bench.results import broken_note, read_results, results_json
from besa.bench.typed_json import ABSENT_IF_NONE, ShapeError, from_json, to_json
from tests.bench.records import contender, everything, serving

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks/results/serving").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_read_and_written_as_they_are(path: Path) -> None:
    assert json.dumps(results_json(read_results(path)), indent=1) + "\n" == path.read_text()


@pytest.mark.parametrize("name", everything())
def test_every_kind_of_run_survives_its_file(tmp_path: Path, name: str) -> None:
    results = everything()[name]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results_json(results)))
    assert results_json(read_results(path)) == results_json(results)
    assert read_results(path) == results


def test_a_broken_contenders_note_is_told_from_others() -> None:
    results = serving({"dense": 1.0})
    broken = contender("dying", broken="its server ended")
    mine = "What is broken and what is not is below."  # a note that only sounds like one
    notes = (broken_note("dying", "its server ended"), mine)
    results = replace(results, contenders=(*results.contenders, broken), notes=notes)
    assert results.other_notes == [mine]
    assert [one.name for one in results.sound] == ["dense"]


@dataclass(frozen=True)
class Inner:
    size: float
    name: str | None = field(default=None, metadata=ABSENT_IF_NONE)


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
