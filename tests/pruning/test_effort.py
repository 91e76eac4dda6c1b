"""`besa prune --effort`: what low and high do more or less than medium, and how high goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from besa.errors import BesaError
from besa.model.prune_record import PruneRecord
from besa.model.record import read_record
from besa.pruning.config import PruneConfig
from besa.pruning.run import prune
from besa.recovery.recover import NothingBetterError
from tests.helpers import digests, run, start


def arguments(model: Path, calibration: Path, *more: object) -> list[object]:
    return [
        "prune", model, "--out", "out", "--calibration", calibration, "--samples", 16,
        "--seqlen", 32, "--device", "cpu", *more,
    ]  # fmt: skip


def high(directory: Path, calibration: Path) -> PruneConfig:
    """Little to prune, with high effort."""
    return PruneConfig(
        out=directory / "out", method="magnitude", effort="high", calibration=str(calibration),
        samples=8, seqlen=32, device="cpu",
    )  # fmt: skip


def pruning_record(directory: Path) -> PruneRecord:
    record = read_record(directory)
    assert isinstance(record, PruneRecord)
    return record


def test_low_is_admm(tiny_model: Path, calibration: Path, tmp_path: Path):
    command = arguments(tiny_model, calibration)
    for out, more in (("low", ["--effort", "low"]), ("admm", ["--update", "admm"])):
        process = run(*command, *more, "--out", out, cwd=tmp_path)
        assert process.returncode == 0, process.errors
    assert digests(tmp_path / "low") == digests(tmp_path / "admm")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (128, "auto", "off")),
        ({"effort": "low"}, (128, "admm", "off")),
        ({"effort": "low", "method": "wanda"}, (128, "none", "off")),
        ({"effort": "low", "update": "auto", "rotate": "on"}, (128, "auto", "on")),
        ({"effort": "high"}, (384, "auto", "auto")),
        ({"effort": "high", "samples": 64, "rotate": "off"}, (64, "auto", "off")),
    ],
    ids=str,
)
def test_what_an_effort_stands_for(settings: dict[str, object], expected: tuple[int, str, str]):
    config = PruneConfig(out="out", **settings)
    assert (config.samples, config.update, config.rotate) == expected


@pytest.mark.slow
def test_high_trains_what_it_pruned_and_goes_on_where_it_was(
    tiny_model: Path, calibration: Path, tmp_path: Path
):
    more = ("--effort", "high", "--method", "wanda", "--rotate", "off")
    command = arguments(tiny_model, calibration, *more)
    process = run(*command, "--out", "whole", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert "distilling held-out divergence" in process.errors
    whole, plain = tmp_path / "whole", tmp_path / "plain"
    record = pruning_record(whole)
    assert record.recovery is not None
    assert record.recovery.after < record.recovery.before
    assert record.recovery.teacher == str(tiny_model)

    # What `besa recover` makes of what `besa prune` gives.
    commands = (
        [*command, "--effort", "medium", "--out", "pruned"],
        [
            "recover", "pruned", "--teacher", tiny_model, "--out", plain, "--text", calibration,
            "--samples", 16, "--seqlen", 32, "--epochs", 2, "--device", "cpu",
        ],
    )  # fmt: skip
    for each in commands:
        assert run(*each, cwd=tmp_path).returncode == 0
    assert digests(plain) == digests(whole)

    process = start(*command, cwd=tmp_path)
    assert process.wait_for((tmp_path / "out.partial/training").exists), process.errors
    process.send(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out.pruned").is_dir()
    again = run(*command, cwd=tmp_path)
    assert again.returncode == 0, again.errors
    assert "block 1/3" not in again.errors
    assert digests(tmp_path / "out") == digests(whole)
    assert not list(tmp_path.glob("out.*"))


def test_what_training_needs_is_looked_for_first(
    tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: False)
    config = PruneConfig(out=tmp_path / "out", effort="high", calibration=str(calibration))
    with pytest.raises(BesaError, match="training needs accelerate"):
        prune(tiny_model, config)
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_is_left_alone(tiny_model: Path, calibration: Path, tmp_path: Path):
    mine = tmp_path / "out.pruned/mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    process = run(*arguments(tiny_model, calibration, "--effort", "high"), cwd=tmp_path)
    assert process.returncode == 2
    assert "out.pruned is not empty" in process.errors
    assert mine.read_text() == "mine"


def test_rounded_weights_are_not_trained(tiny_model: Path, calibration: Path, tmp_path: Path):
    more = ("--effort", "high", "--method", "magnitude", "--quantize", "int8")
    process = run(*arguments(tiny_model, calibration, *more), cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert pruning_record(tmp_path / "out").recovery is None


def test_where_training_helps_nothing_the_pruned_model_stays(
    tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> None:
        raise NothingBetterError("nothing better")

    monkeypatch.setattr("besa.recovery.recover.recover", fails)
    result = prune(tiny_model, high(tmp_path, calibration))
    assert result.record.recovery is None
    assert "made nothing better" in result.record.notes[-1]
    assert "made nothing better" in (tmp_path / "out/report.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_teacher_that_does_not_fit_leaves_the_pruned_model(
    tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> None:
        raise BesaError("the model, its dense teacher and all else does not fit")

    monkeypatch.setattr("besa.recovery.recover.recover", fails)
    with pytest.raises(BesaError, match=r"the pruned model is in .*out\.pruned"):
        prune(tiny_model, high(tmp_path, calibration))
    assert pruning_record(tmp_path / "out.pruned").sparsity.achieved == 0.5
