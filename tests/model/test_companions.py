"""What travels with the weights: all that belongs to the model, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from besa.model.companions import companions_of
from tests.export.sparse import pruned_model
from tests.helpers import run

# What a directory of the hub may hold beside what every model has, and whether it belongs.
BELONGS = {
    "LICENSE": True,
    "NOTICE.md": True,
    "modeling_own.py": True,
    "own_code/layers.py": True,
    "additional_chat_templates/tool_use.jinja": True,
    "1_Pooling/config.json": True,
    "tokenizer.model": True,
    "n" * 250: True,
    "pytorch_model.bin": False,
    "optimizer.pt": False,
    "consolidated.safetensors": False,
    "pytorch_model.bin.index.json": False,
    "original/consolidated.00.pth": False,
    "original/tokenizer.model": False,
    "onnx/model.onnx": False,
    "onnx/config.json": False,
    ".git/config": False,
    "own_code/__pycache__/layers.pyc": False,
}


@pytest.fixture
def crowded(tiny_model: Path, tmp_path: Path) -> Path:
    wide = {"hidden_size": 64, "head_dim": 16}  # as ONNX Runtime's fused attention takes it
    directory = pruned_model("llama", tmp_path / "crowded", tiny_model, **wide)
    for name in BELONGS:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"of {name}")
    return directory


@pytest.mark.usefixtures("crowded")
def test_a_file_that_belongs_travels_along(tmp_path: Path) -> None:
    few = ("--method", "wanda", "--samples", 2, "--seqlen", 16)
    for command in (
        ("prune", "crowded", "--out", "out", *few),
        ("export", "crowded", "--out", "out"),
        ("export", "crowded", "--format", "onnx", "--sparse", "--out", "out"),
    ):
        process = run(*command, cwd=tmp_path)
        assert process.returncode == 0, process.errors
        for name, belongs in BELONGS.items():
            copy = tmp_path / "out" / name
            assert copy.is_file() == belongs, (command, name)
            assert not belongs or name.startswith("tokenizer") or "of " in copy.read_text()
        (line,) = [line for line in process.errors.splitlines() if "not copied" in line]
        assert line.startswith(f"besa {command[0]}: not copied from crowded: ")
        for name in ("pytorch_model.bin", "optimizer.pt", "consolidated.safetensors"):
            assert f" {name} (" in line
        assert " onnx/ (" in line
        assert " original/ (" in line
        for silent in (".git", "index.json", "model.safetensors ", "README"):
            assert silent not in line
        shutil.rmtree(tmp_path / "out")


def test_what_is_large_stays_behind(crowded: Path) -> None:
    with (crowded / "video.mp4").open("wb") as file:
        os.truncate(file.fileno(), (64 << 20) + 1)
    found = companions_of(crowded)
    assert Path("video.mp4") not in found.copied
    assert any(line.startswith("video.mp4 (67.1 MB") for line in found.left_out)


def test_an_output_within_the_model_is_no_part_of_it(crowded: Path, tmp_path: Path) -> None:
    few = ("--method", "wanda", "--samples", 2, "--seqlen", 16)
    for _ in range(2):
        out = ("--out", "crowded/out", "--overwrite")
        process = run("prune", "crowded", *out, *few, cwd=tmp_path)
        assert process.returncode == 0, process.errors
        assert not (crowded / "out/out").exists()
        assert "out.partial" not in process.errors


def test_links_are_followed_to_files_alone(crowded: Path) -> None:
    """Files of the hub's cache are links; a folder that is one may lead round in a circle."""
    (crowded / "linked.json").symlink_to(crowded / "config.json")
    (crowded / "nowhere.json").symlink_to(crowded / "missing")
    (crowded / "round").symlink_to(crowded)
    copied = companions_of(crowded).copied
    assert Path("linked.json") in copied
    assert not {Path("nowhere.json"), Path("round")} & set(copied)
    assert all("round" not in path.parts for path in copied)


@pytest.mark.parametrize("length", [245, 300])
@pytest.mark.parametrize(
    "command",
    [
        ("prune", "model", "--out", "LONG"),
        ("export", "model", "--out", "LONG"),
        ("recover", "model", "--teacher", "model", "--out", "LONG"),
        ("prune", "LONG", "--out", "out"),
        ("export", "LONG", "--out", "out"),
        ("eval", "LONG"),
        ("prune", "model", "--out", "out", "--calibration", "LONG.jsonl"),
        ("eval", "model", "--text", "LONG.txt"),
    ],
)
def test_a_name_that_is_too_long(
    tiny_model: Path, tmp_path: Path, command: tuple[str, ...], length: int
) -> None:
    (tmp_path / "model").symlink_to(tiny_model)
    words = [word.replace("LONG", "x" * length) for word in command]
    process = run(*words, cwd=tmp_path)
    assert process.returncode == 2
    assert process.output == ""
    (line,) = process.errors.splitlines()
    assert line.startswith(f"besa {command[0]}: ")
    assert "Errno" not in line
    assert length < 300 or "too long" in line
    assert {path.name for path in tmp_path.iterdir()} == {"model", "stdout-0", "stderr-0"}
