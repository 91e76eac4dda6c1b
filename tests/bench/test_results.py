"""results.json as a type: what was written by earlier versions is read, and written as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from besa.bench.results import Perplexity, broken_note, read_results, results_json
from besa.typed_json import from_json, to_json
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


def test_a_perplexity_says_how_its_windows_began() -> None:
    sizes = {"tokens": 1022, "seqlen": 512}
    found = {"text": "a.txt", "perplexity": 9.0, "standard_error": 0.1, **sizes}
    begun, plain = (from_json(Perplexity, {**found, "bos": bos}) for bos in (True, False))
    assert begun.read == "a.txt, 1,022 tokens in windows of 512, each after a beginning token"
    assert plain.read == "a.txt, 1,022 tokens in windows of 512"
    assert to_json(begun)["bos"]
    assert "bos" not in to_json(plain)
