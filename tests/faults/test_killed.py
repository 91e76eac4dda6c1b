"""Runs that are killed at random moments of their own progress go on to the same bytes.

Twenty moments of `besa prune`, twenty of `besa export`; three of an ONNX export, which takes
seconds.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.export.sparse import pruned_model
from tests.faults.operations import watch
from tests.helpers import digests, run

MOMENTS = 20

Command = list[object]


@pytest.fixture(scope="module")
def pruned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_model("llama", tmp_path_factory.mktemp("models") / "pruned", tiny_model)


def prune(model: Path, text: Path) -> Command:
    options = ["--samples", 8, "--seqlen", 32, "--device", "cpu", "--method", "wanda"]
    return [
        "prune",
        model,
        "--out",
        "out",
        "--calibration",
        text,
        "--activations",
        "disk",
        *options,
    ]


def export(model: Path, _text: Path) -> Command:
    return ["export", model, "--out", "out", "--quantize", "int8"]


def moments(seed: int, total: int, count: int) -> list[tuple[int, float]]:
    """Operations, and how long after each; half of them at once."""
    chance = Random(seed)
    return [
        (chance.randint(1, total), chance.choice([0.0, chance.uniform(1e-5, 2e-3)]))
        for _ in range(count)
    ]


@pytest.mark.parametrize("command", [prune, export], ids=["prune", "export"])
def test_killed_at_twenty_moments(
    command: Callable[[Path, Path], Command], pruned: Path, calibration: Path, tmp_path: Path
):
    """What a killed run leaves is what the next one begins with, until one comes to its end."""
    arguments = command(pruned, calibration)
    (tmp_path / "whole").mkdir()
    report = tmp_path / "report"
    watched = {"within": "out", "report": str(report)}
    process = run(*arguments, cwd=tmp_path / "whole", operations=watched)
    assert process.returncode == 0, process.errors
    whole, total = digests(tmp_path / "whole/out"), report.stat().st_size
    assert total > 40

    here = tmp_path / "here"
    here.mkdir()
    killed = finished = 0
    for kill_at, after in moments(0, total, MOMENTS):
        fault = {"within": "out", "kill_at": kill_at, "after": after}
        process = run(*arguments, cwd=here, operations=fault)
        killed += process.returncode in (-signal.SIGKILL, -signal.SIGALRM)
        assert process.returncode in (-signal.SIGKILL, -signal.SIGALRM, 0), process.errors
        if (here / "out").exists():  # perhaps killed after its last rename: then all must be there
            assert digests(here / "out") == whole
            finished += 1
            (here / "out").rename(tmp_path / f"finished-{finished}")
    assert killed > MOMENTS // 2
    process = run(*arguments, cwd=here)
    assert process.returncode == 0, process.errors
    assert digests(here / "out") == whole
    assert not (here / "out.partial").exists()


def test_an_onnx_export_that_was_killed_begins_anew(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In children of this process, so that ONNX is imported once."""
    from besa.errors import BesaError
    from besa.export import ExportConfig
    from besa.export import export as export_model
    from besa.export.onnx.runtime import genai

    try:
        genai()
    except BesaError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    model = pruned_model("llama", tmp_path / "model", tiny_model, head_dim=16)

    def besa(out: str, **fault: object) -> int:
        """Exports in a child; how that ended."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                watch(within=out, **fault)
                export_model(model, ExportConfig(out=out, format="onnx"))
                code = 0
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert besa("whole", report="report") == 0
    total = Path("report").stat().st_size
    for kill_at, after in moments(1, total, 3):
        assert besa("out", kill_at=kill_at, after=after) in (-signal.SIGKILL, -signal.SIGALRM)
        assert not Path("out").exists()
    assert besa("out") == 0
    assert digests(Path("out")) == digests(Path("whole"))
    assert not Path("out.partial").exists()
