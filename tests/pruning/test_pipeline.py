"""The GPU's way through the blocks, on the CPU: late copies and a thread give the same bytes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from besa.errors import BesaError
from besa.model.checkpoint import Checkpoint
from besa.pruning import pipeline
from besa.pruning.config import PruneConfig
from besa.pruning.record import run_record
from besa.pruning.transfers import StagedCopies
from tests.helpers import assert_same_record, digests
from tests.pruning.test_activations import FakeCopies

MakeModel = Callable[[str], Path]


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes runs on the CPU use copies and load ahead; gives the threads that loaded blocks."""
    threads: list[str] = []
    load = Checkpoint.load_block

    def noted(self: Checkpoint, index: int, *files: object) -> nn.Module:
        threads.append(threading.current_thread().name)
        return load(self, index, *files)

    monkeypatch.setattr(pipeline, "_loads_ahead", lambda device: True)
    monkeypatch.setattr(pipeline, "copies_for", lambda device: FakeCopies(eager=False))
    monkeypatch.setattr(Checkpoint, "load_block", noted)
    return threads


def prune(model: Path, out: Path, calibration: Path, method: str, **settings: object) -> None:
    config = PruneConfig(
        out=out,
        calibration=str(calibration),
        method=method,
        samples=20,
        seqlen=64,
        epochs=2,
        device="cpu",
        **settings,
    )
    pipeline.prune_blocks(model, config)


@pytest.mark.parametrize(
    ("family", "method", "update"),
    [
        ("llama", "besa", "none"),
        ("llama", "sparsegpt", "none"),
        ("llama", "wanda", "obs"),
        ("mixtral", "besa", "none"),
        ("gpt2", "besa", "none"),
    ],
)
def test_late_copies_and_a_thread_change_no_byte(
    family: str,
    method: str,
    update: str,
    family_model: MakeModel,
    calibration: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
):
    model = family_model(family)
    prune(model, tmp_path / "usual", calibration, method, update=update)
    threads = request.getfixturevalue("like_a_gpu")
    prune(model, tmp_path / "gpu", calibration, method, update=update)
    assert any(name.startswith("next-block") for name in threads)
    assert digests(tmp_path / "gpu") == digests(tmp_path / "usual")
    assert_same_record(tmp_path / "gpu", tmp_path / "usual")


def test_activations_on_disk_go_through_buffers(
    family_model: MakeModel, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = family_model("llama")
    prune(model, tmp_path / "usual", calibration, "besa")
    buffers = [torch.empty(1 << 16) for _ in range(4)]
    copies = StagedCopies(FakeCopies(eager=False), buffers)
    monkeypatch.setattr(pipeline, "copies_for", lambda device: copies)
    prune(model, tmp_path / "disk", calibration, "besa", activations="disk")
    assert digests(tmp_path / "disk") == digests(tmp_path / "usual")


def test_a_bad_weight_of_the_next_block_is_said_when_it_is_its_turn(
    family_model: MakeModel,
    calibration: Path,
    tmp_path: Path,
    like_a_gpu: list[str],
):
    model = tmp_path / "model"
    shutil.copytree(family_model("llama"), model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BesaError, match=rf"{name} has 1 values that are NaN .*mend the checkpoint"):
        prune(model, tmp_path / "out", calibration, "wanda")
    partial = tmp_path / "out.partial"
    assert (partial / "block-00000.finished.json").exists()
    assert not (partial / "block-00001.finished.json").exists()
    assert like_a_gpu[0] == "MainThread"


@pytest.mark.usefixtures("like_a_gpu")
def test_a_damaged_block_before_finished_ones_is_redone(
    family_model: MakeModel, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = family_model("llama")
    prune(model, tmp_path / "whole", calibration, "magnitude")

    def ended(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_record", ended)
    with pytest.raises(KeyboardInterrupt):
        prune(model, tmp_path / "out", calibration, "magnitude")
    monkeypatch.setattr(pipeline, "run_record", run_record)
    (tmp_path / "out.partial" / "block-00000.finished.json").unlink()
    prune(model, tmp_path / "out", calibration, "magnitude")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
