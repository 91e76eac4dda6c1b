"""`besa bench compare`: what is a regression, what is noise, and what CI sees of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from besa.cli import main
from tests.bench.records import contender, serving


def files(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, results in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(results))
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
    before, after = serving({"dense": 1.0}), serving({"dense": 1.0})
    for results, median in ((before, 1.0), (after, 1.1)):
        for figure in results["measurements"][0]["summary"].values():
            figure |= {"median": median, "low": median - 0.3, "high": median + 0.3}
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 0


def test_what_is_broken_or_gone_is_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = serving({"dense": 1.0, "50%": 1.5})
    after = serving({"dense": 1.0})
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 1
    assert "50% is not there any more" in capsys.readouterr().out
    after["contenders"].append(contender("50%", broken="its server ended"))
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 1
    assert "50% is broken now: its server ended" in capsys.readouterr().out


def test_more_bytes_are_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = serving({"dense": 1.0}), serving({"dense": 1.0})
    after["contenders"][0]["disk_bytes"] *= 2
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 1
    assert "bytes on disk" in capsys.readouterr().out


def test_what_else_differs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = serving({"dense": 1.0}), serving({"dense": 1.0})
    after["machine"]["cpu"] = "Another Processor"
    assert main(["bench", "compare", *files(tmp_path, before, after)]) == 0
    assert "cpu was A Processor, is Another Processor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "is no results.json"),
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
