"""`besa recover` as a process: what it writes, what it promises, how it goes on."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa.data.windows import calibration_windows, token_stream
from besa.errors import BesaError
from besa.model.prune_record import PruneRecord
from besa.model.record import read_record
from besa.recovery.config import RecoverConfig
from besa.recovery.recover import recover
from tests.agents import Torchrun, workers
from tests.helpers import (
    Process,
    digests,
    everything,
    fill,
    load_strictly,
    random_model,
    run,
    save_with_tokenizer,
    small_disk,
    start,
)

Tensors = dict[str, torch.Tensor]
Pruned = Callable[[str], tuple[Path, Path]]
Recovered = Callable[[str], tuple[Path, Process]]


@pytest.fixture(scope="session")
def pruned_model(
    tiny_model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pruned:
    """A family's tiny model and what Wanda leaves of it, made once. Do not write into them."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            dense = tiny_model
            if family != "tiny":
                dense = save_with_tokenizer(random_model(family), directory / "dense", tiny_model)
            process = run(
                "prune", dense, "--out", "pruned", "--method", "wanda",
                "--calibration", calibration, "--samples", 8, "--seqlen", 32, "--device", "cpu",
                cwd=directory,
            )  # fmt: skip
            assert process.returncode == 0, process.errors
            made[family] = dense, directory / "pruned"
        return made[family]

    return make


def arguments(dense: Path, pruned: Path, calibration: Path, *more: object) -> list[object]:
    return [
        "recover", pruned, "--teacher", dense, "--out", "out", "--text", calibration,
        "--samples", 40, "--seqlen", 32, "--device", "cpu", "--step", 0.005, *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def recovered(
    pruned_model: Pruned,
    calibration: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Recovered:
    """A family's pruned model recovered, made once; and the process that did it."""
    made: dict[str, tuple[Path, Process]] = {}

    def make(family: str) -> tuple[Path, Process]:
        if family not in made:
            directory = tmp_path_factory.mktemp(f"recovered-{family}")
            process = run(*arguments(*pruned_model(family), calibration), cwd=directory)
            assert process.returncode == 0, process.errors
            made[family] = directory / "out", process
        return made[family]

    return make


def tensors_of(directory: Path) -> Tensors:
    found: Tensors = {}
    for path in directory.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def pruning_record(directory: Path) -> PruneRecord:
    record = read_record(directory)
    assert isinstance(record, PruneRecord)
    return record


@torch.no_grad()
def divergence_of(model: Path, dense: Path, rows: torch.Tensor) -> float:
    own, aim = (
        AutoModelForCausalLM.from_pretrained(path)(rows).logits.double().log_softmax(-1)
        for path in (model, dense)
    )
    return float((aim.exp() * (aim - own)).sum(-1).mean())


@pytest.mark.parametrize("family", ["tiny", "gpt2", "mixtral", "gemma3_text"])
def test_zeros_stay_and_the_output_comes_nearer(
    family: str, pruned_model: Pruned, recovered: Recovered, calibration: Path
):
    dense, pruned = pruned_model(family)
    out, process = recovered(family)
    load_strictly(out)
    before, after = tensors_of(pruned), tensors_of(out)
    assert before.keys() == after.keys()
    linears = {
        f"{block.name}.{linear.name}.weight"
        for block in pruning_record(pruned).blocks
        for linear in block.linears
    }
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    for name in changed:
        assert torch.equal(after[name] == 0, before[name] == 0), name
    prefix = pruning_record(pruned).blocks[0].name.rpartition(".")[0]
    assert all(prefix in name for name in changed)
    if family == "tiny":
        assert linears <= changed

    rows = calibration_windows(
        token_stream(AutoTokenizer.from_pretrained(pruned), [calibration.read_text()]),
        40,
        32,
        seed=0,
    )[-5:]
    recovery = pruning_record(out).recovery
    assert recovery is not None
    assert recovery.before == pytest.approx(divergence_of(pruned, dense, rows), rel=1e-3)
    assert recovery.after == pytest.approx(divergence_of(out, dense, rows), rel=1e-3)
    assert recovery.after < recovery.before
    assert recovery.tokens == 35 * 32
    printed = f"{recovery.before:.4f} -> {recovery.after:.4f} nats a token"
    assert printed in process.output


def test_what_is_left_says_how_it_came_about(
    pruned_model: Pruned, recovered: Recovered, calibration: Path, tmp_path: Path
):
    dense, pruned = pruned_model("tiny")
    out, _ = recovered("tiny")
    assert {path.name for path in out.iterdir()} == {
        path.name for path in pruned.iterdir() if path.name != "log.jsonl"
    }
    assert not list(out.parent.glob("out.*"))
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    record, former = pruning_record(out), pruning_record(pruned)
    assert record.blocks == former.blocks
    assert record.digests != former.digests
    for page in ("report.html", "README.md"):
        words = (out / page).read_text()
        assert f"trained as a whole towards {dense.name}" in words
        assert str(dense) not in words
    # What comes after takes it as it takes any pruned model.
    process = run("export", out, "--out", "packed", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    again = run(*arguments(dense, out, calibration), "--out", "again", cwd=tmp_path)
    assert again.returncode == 0, again.errors


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--gradient-checkpointing"], ["--dtype", "bfloat16"]], ids=str)
def test_cheaper_ways(
    more: list[str], pruned_model: Pruned, recovered: Recovered, calibration: Path, tmp_path: Path
):
    process = run(*arguments(*pruned_model("tiny"), calibration, *more), cwd=tmp_path)
    assert process.returncode == 0, process.errors
    plain, _ = recovered("tiny")
    expected, found = (pruning_record(path).recovery for path in (plain, tmp_path / "out"))
    assert expected is not None
    assert found is not None
    gained = expected.before - expected.after
    assert found.before - found.after == pytest.approx(gained, rel=0.2)


# ----------------------------------------------------------------------------- going on


@pytest.mark.slow
def test_killed_and_gone_on_with(
    pruned_model: Pruned, recovered: Recovered, calibration: Path, tmp_path: Path
):
    command = arguments(*pruned_model("tiny"), calibration)
    training = tmp_path / "out.partial/training/0.005"
    for steps in (4, 16, 28):
        process = start(*command, cwd=tmp_path)
        # At once when a checkpoint appears, so that it is not whole: the one before it is.
        assert process.wait_for((training / f"checkpoint-{steps}").exists), process.errors
        process.send(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists()
    refused = run(*command, "--step", 0.01, cwd=tmp_path)
    assert refused.returncode == 2
    assert "step = 0.005, not 0.01" in refused.errors
    process = run(*command, cwd=tmp_path)
    assert process.returncode == 0, process.errors
    whole, _ = recovered("tiny")
    assert digests(tmp_path / "out") == digests(whole)


@pytest.mark.slow
def test_interrupted(pruned_model: Pruned, calibration: Path, tmp_path: Path):
    dense, pruned = pruned_model("tiny")
    process = start(*arguments(dense, pruned, calibration), "--epochs", 50, cwd=tmp_path)
    assert process.wait_for((tmp_path / "out.partial/training").exists), process.errors
    process.send(signal.SIGINT)
    assert process.wait() == 130
    assert "same command goes on" in process.errors.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up(
    pruned_model: Pruned, recovered: Recovered, calibration: Path, tmp_path: Path
):
    with small_disk(tmp_path / "disk", "24M") as disk:
        command = [*arguments(*pruned_model("tiny"), calibration), "--out", disk / "out"]
        process = start(*command, cwd=tmp_path)
        assert process.wait_for((disk / "out.partial/training/0.005/checkpoint-4/whole").exists)
        ballast = fill(disk)
        assert process.wait() == 2, process.errors
        assert "the disk is full" in process.errors.splitlines()[-1]
        assert "Traceback" not in process.errors
        ballast.unlink()
        process = run(*command, cwd=tmp_path)
        assert process.returncode == 0, process.errors
        whole, _ = recovered("tiny")
        assert digests(disk / "out") == digests(whole)


# ------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def alone(
    pruned_model: Pruned, calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What one process makes in steps of two samples."""
    directory = tmp_path_factory.mktemp("alone")
    process = run(*in_pairs(pruned_model, calibration), cwd=directory)
    assert process.returncode == 0, process.errors
    return directory / "out"


def in_pairs(pruned_model: Pruned, calibration: Path) -> list[object]:
    return arguments(*pruned_model("tiny"), calibration, "--batch-size", 2)


def assert_near(ours: Path, theirs: Path) -> None:
    """The same up to the order of sums, and the same zeros."""
    expected = tensors_of(theirs)
    for name, value in tensors_of(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
        assert torch.equal(value == 0, expected[name] == 0), name
    recoveries = [pruning_record(path).recovery for path in (ours, theirs)]
    assert all(recoveries)
    found, wanted = ((x.before, x.after, x.tokens) for x in recoveries if x)
    assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_like_one(
    alone: Path, pruned_model: Pruned, calibration: Path, tmp_path: Path
):
    process = run(*in_pairs(pruned_model, calibration), cwd=tmp_path, launch=Torchrun(2))
    assert process.returncode == 0, process.errors
    assert_near(tmp_path / "out", alone)
    assert process.output.count("nats a token") == 1
    lines = process.errors.splitlines()
    assert {line.split(" divergence")[0] for line in lines} == {"distilling held-out"}
    assert len(lines) == len(set(lines))


@pytest.mark.slow
def test_a_killed_process_ends_all_and_one_process_goes_on(
    alone: Path, pruned_model: Pruned, calibration: Path, tmp_path: Path
):
    command = in_pairs(pruned_model, calibration)
    process = start(*command, cwd=tmp_path, launch=Torchrun(2))
    whole = tmp_path / "out.partial/training/0.005/checkpoint-4/whole"
    assert process.wait_for(whole.exists), process.errors
    workers(process.pid)[-1].kill()
    assert process.wait() != 0
    assert not (tmp_path / "out").exists()
    gone_on = run(*command, cwd=tmp_path)
    assert gone_on.returncode == 0, gone_on.errors
    assert_near(tmp_path / "out", alone)


@pytest.mark.slow
def test_steps_that_two_processes_cannot_share(
    pruned_model: Pruned, calibration: Path, tmp_path: Path
):
    command = arguments(*pruned_model("tiny"), calibration)
    process = run(*command, cwd=tmp_path, launch=Torchrun(2))
    [line] = [line for line in process.errors.splitlines() if line.startswith("besa recover: ")]
    assert line.endswith("2 processes cannot share steps of 1 sample: give --batch-size 2")
    assert not list(tmp_path.glob("out*"))


# ----------------------------------------------------------------------- users' mistakes


def refusal(process: Process, out: Path) -> str:
    """The line that a refused run says."""
    assert process.returncode == 2, process.output
    assert not out.exists()
    line = process.errors.splitlines()[-1]
    assert line.startswith("besa recover: ")
    assert "Traceback" not in process.errors
    return line


def test_training_that_helps_nothing_leaves_nothing(
    pruned_model: Pruned, calibration: Path, tmp_path: Path
):
    dense, pruned = pruned_model("tiny")
    process = run(*arguments(dense, pruned, calibration), "--step", 50, cwd=tmp_path)
    line = refusal(process, tmp_path / "out")
    assert "made nothing better" in line
    assert "smaller --step" in line
    assert not list(tmp_path.glob("out*"))


def test_a_step_that_does_harm_is_made_smaller(
    pruned_model: Pruned, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("besa.recovery.training.STEPS", (50.0, 0.005, 0.001))
    dense, pruned = pruned_model("tiny")
    config = RecoverConfig(
        out=tmp_path / "out",
        teacher=dense,
        text=str(calibration),
        samples=40,
        seqlen=32,
        device="cpu",
    )
    told: list[float | None] = []
    found = recover(pruned, config, lambda event: told.append(event.done))
    assert found.step == 0.005
    assert found.after < found.before
    assert told.index(35) > told.index(4)  # and 4, the first look, came twice
    assert told.count(4) > told.count(8)


def test_wrong_models_are_named(
    pruned_model: Pruned,
    tiny_model: Path,
    calibration: Path,
    tmp_path: Path,
):
    dense, pruned = pruned_model("tiny")
    wider = random_model("llama", vocab_size=300)
    other = save_with_tokenizer(wider, tmp_path / "other", tiny_model)
    bare = tmp_path / "bare"
    shutil.copytree(pruned, bare)
    (bare / "besa.json").unlink()
    assert run("export", pruned, "--out", "packed", cwd=tmp_path).returncode == 0
    words = {
        "knows 300 words and the pruned model 257": (other, pruned),
        "has no besa.json of a pruned model": (dense, bare),
        "is quantized (besa)": (dense, tmp_path / "packed"),
        "nothing does not exist": ("./nothing", pruned),
    }
    before = everything(pruned)
    for expected, (teacher, student) in words.items():
        process = run(*arguments(teacher, student, calibration), cwd=tmp_path)
        assert expected in refusal(process, tmp_path / "out")
    assert everything(pruned) == before


def test_without_accelerate(pruned_model: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dense, pruned = pruned_model("tiny")
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: False)
    with pytest.raises(BesaError, match=r"pip install 'besa\[recover\]'"):
        recover(pruned, RecoverConfig(out=tmp_path / "out", teacher=dense))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"samples": 7}, "give --samples 8 or more"),
        ({"step": 0.0}, "step 0.0 is not positive"),
        ({"epochs": 0}, "epochs 0 is not positive"),
        ({"dtype": "float16"}, "use bfloat16"),
        ({"bos": "perhaps"}, "choose one of auto, always, never"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(setting: dict[str, object], words: str):
    with pytest.raises(BesaError, match=words):
        RecoverConfig(out="out", teacher="dense", **setting)


def test_the_record_is_json(pruned_model: Pruned, calibration: Path, tmp_path: Path):
    dense, pruned = pruned_model("tiny")
    assert "recovery" not in json.loads((pruned / "besa.json").read_text())
    assert run(*arguments(dense, pruned, calibration), "--samples", 8, cwd=tmp_path).returncode == 0
    found = json.loads((tmp_path / "out/besa.json").read_text())["recovery"]
    assert found["teacher"] == str(dense)
    assert found["settings"]["samples"] == 8
