"""Models with code of their own: refused without a question, and run where the user says so."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import PATIENCE, REPOSITORY, run, stored

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

Path({ran!r}).touch()

class MineConfig(LlamaConfig):
    model_type = "mine"
"""

MODELING = """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""

FEW = ["--method", "wanda", "--samples", 2, "--seqlen", 16]
TRUST = "--trust-remote-code"


@pytest.fixture
def mine(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model as a type that only the code beside it knows."""
    directory = tmp_path / "mine"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["MineForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "configuration_mine.py").write_text(
        CONFIGURATION.format(ran=str(tmp_path / "ran"))
    )
    (directory / "modeling_mine.py").write_text(MODELING)
    return directory


@pytest.mark.parametrize(
    "command",
    [
        ("prune", "mine", "--out", "out", *FEW),
        ("eval", "mine", "--seqlen", 16, "--limit", 1),
        ("export", "mine", "--out", "out"),
        ("export", "mine", "--out", "out", "--format", "dense"),
        ("recover", "mine", "--teacher", "mine", "--out", "out"),
    ],
    ids=lambda command: f"{command[0]}-{command[-1]}",
)
def test_code_of_a_model_does_not_run_unasked(
    command: tuple[object, ...], mine: Path, tmp_path: Path
):
    process = run(*command, cwd=tmp_path)
    assert process.returncode == 2
    (line,) = process.errors.splitlines()
    assert "mine brings code of its own" in line
    assert TRUST in line
    assert not (tmp_path / "ran").exists()
    assert not [*tmp_path.glob("out*")]
    assert mine.is_dir()


def test_no_question_is_asked_on_a_terminal(mine: Path, tmp_path: Path):
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n")
    arguments = ["prune", str(mine), "--out", str(tmp_path / "out"), *map(str, FEW)]
    process = subprocess.run(
        [sys.executable, "-m", "besa", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 2
    assert "[y/N]" not in process.stdout + process.stderr
    assert not (tmp_path / "ran").exists()


def test_trusted_code_prunes_packs_and_unpacks(mine: Path, tiny_model: Path, tmp_path: Path):
    def besa(*arguments: object) -> str:
        process = run(*arguments, TRUST, cwd=tmp_path)
        assert process.returncode == 0, process.errors
        return process.output

    besa("prune", mine, "--out", "pruned", *FEW)
    assert (tmp_path / "ran").exists()
    for name in ("configuration_mine.py", "modeling_mine.py"):
        assert (tmp_path / "pruned" / name).read_bytes() == (mine / name).read_bytes()
    plain = run("prune", tiny_model, "--out", "plain", *FEW, cwd=tmp_path)
    assert plain.returncode == 0
    ours, theirs = stored(tmp_path / "pruned"), stored(tmp_path / "plain")
    assert all((ours[key] == theirs[key]).all() for key in theirs)

    besa("export", "pruned", "--out", "packed")
    assert (tmp_path / "packed" / "modeling_mine.py").is_file()
    figures = json.loads(
        besa(
            "eval", "pruned", "packed", "--seqlen", 16, "--limit", 4, "--dtype", "float32", "--json"
        )
    )
    dense, packed = (result["perplexity"] for result in figures["results"])
    assert packed == pytest.approx(dense, rel=1e-4)
    besa("export", "packed", "--out", "back", "--format", "dense")
    again = stored(tmp_path / "back")
    assert all((again[key] == ours[key]).all() for key in ours)


def test_code_beside_a_model_that_transformers_knows_stays_aside(tiny_model: Path, tmp_path: Path):
    directory = tmp_path / "known"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_mine.MineConfig"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "configuration_mine.py").write_text(
        CONFIGURATION.format(ran=str(tmp_path / "ran"))
    )
    process = run("prune", directory, "--out", "out", *FEW, cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert not (tmp_path / "ran").exists()
