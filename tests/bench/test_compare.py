"""`besa bench compare`: what is a regression, what is noise, and what CI sees of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from besa.bench.results import Results, results_json
from besa.cli import main
from tests.bench.records import contender, serving


def files(tmp_path: Path, before: Results, after: Results) -> list[str]:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, results in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(results_json(results)))
    return list(map(str, paths))


def test_the_same_is_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = serving({"dense": 1.0, "50%": 1.5})
    assert main(["bench", "compare", *files(tmp_path, run, run)]) == 0
    said = capsys.readouterr().out
    assert "no regression of more than 5.0%" in said
    assert "WORSE" not in said


def test_slower_is_a_regression_and_faster_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = serving({"dense": 1.0}), serving({"dense": 0.5})
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 1
    said = capsys.readouterr().out
    assert "WORSE   dense, 1 at a time: ttft_p50" in said
    assert "WORSE   dense, 1 at a time: output_tps" in said
    assert main(["bench", "compare", *files(tmp_path, after, before)]) == 0
    assert "better  dense, 1 at a time: itl_p50" in capsys.readouterr().out


def test_the_threshold_decides(tmp_path: Path) -> None:
    before, after = serving({"dense": 1.0}), serving({"dense": 0.8})
    paths = files(tmp_path, before, after)
    assert main(["bench", "compare", *paths]) == 1
    assert main(["bench", "compare", *paths, "--threshold", "0.5"]) == 0


def test_noise_is_no_regression(tmp_path: Path) -> None:
    """Medians differ by 10%, but the rounds of either run differ by more."""
    before, after = (
        with_medians(serving({"dense": 1.0}), median, interval=0.3) for median in (1.0, 1.1)
    )
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 0


def with_medians(results: Results, median: float, interval: float) -> Results:
    """The same run, but every figure's median and interval are these."""
    (measurement,) = results.measurements
    ends = {"low": median - interval, "high": median + interval}
    summary = {k: replace(v, median=median, **ends) for k, v in measurement.summary.items()}
    return replace(results, measurements=(replace(measurement, summary=summary),))


def test_what_is_broken_or_gone_is_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = serving({"dense": 1.0, "50%": 1.5})
    after = serving({"dense": 1.0})
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 1
    assert "50% is not there any more" in capsys.readouterr().out
    broken = contender("50%", broken="its server ended")
    after = replace(after, contenders=(*after.contenders, broken))
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 1
    assert "50% is broken now: its server ended" in capsys.readouterr().out


def test_more_bytes_are_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = serving({"dense": 1.0}), serving({"dense": 1.0})
    (dense,) = after.contenders
    assert dense.disk_bytes is not None
    after = replace(after, contenders=(replace(dense, disk_bytes=2 * dense.disk_bytes),))
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 1
    assert "bytes on disk" in capsys.readouterr().out


def test_what_else_differs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = serving({"dense": 1.0}), serving({"dense": 1.0})
    after = replace(after, machine=replace(after.machine, cpu="Another Processor"))
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 0
    assert "cpu was A Processor, is Another Processor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "is no results.json"),
        ('{"schema_version": 1, "kind": "serving"}', "is damaged: date is missing"),
        ('{"schema_version": 2}', "has schema version 2, this besa reads 1"),
    ],
)
def test_what_is_no_result_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert main(["bench", "compare", str(path), str(path)]) == 2
    assert words in capsys.readouterr().err
