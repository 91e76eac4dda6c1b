"""A run that is killed, interrupted, starved or damaged goes on to the same bytes."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import (
    Process,
    assert_same_record,
    digests,
    everything,
    fill,
    random_model,
    run,
    save_with_tokenizer,
    small_disk,
    start,
)
from tests.pruning.output import Output

BLOCKS = 3


class Case(Output):
    """A command, where its output goes, and what an undisturbed run of it gives."""

    def arguments(self, *more: object) -> list[str]:
        given = {
            "--out": self.out,
            "--calibration": self.calibration,
            "--samples": 16,
            "--seqlen": 32,
            "--epochs": 20,
            "--device": "cpu",
        }
        flat = [str(part) for pair in given.items() for part in pair]
        return ["prune", str(self.model), *flat, *self.options, *map(str, more)]

    def start(self, *more: object) -> Process:
        return start(*self.arguments(*more), cwd=self.directory)

    def run(self, *more: object, **options: object) -> Process:
        return run(*self.arguments(*more), cwd=self.directory, **options)

    def reached(self, block: int, phase: str) -> bool:
        """Whether the log says that a phase of a block is over."""
        log = self.partial / "log.jsonl"
        words = f'"block": {block}, "blocks": {BLOCKS}, "phase": "{phase}"'
        return log.exists() and words in log.read_text()

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """Starts the command and kills it once the condition holds."""
        process = self.start()
        assert process.wait_for(condition), process.errors
        assert not self.out.exists()
        process.send(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)

    def goes_on_to(self, whole: Path) -> Process:
        """Runs the command again and compares what it gives with an undisturbed run."""
        process = self.run()
        assert process.returncode == 0, process.errors
        assert digests(self.out) == digests(whole)
        assert_same_record(self.out, whole)
        assert not self.partial.exists()
        return process


def one_line(process: Process) -> str:
    """What a failed run says: its last line, and nothing but progress before it."""
    *progress, line = process.errors.splitlines()
    assert all(re.match(r"block \d+/\d+  ", before) for before in progress), process.errors
    assert line.startswith("besa prune: ")
    return line


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks with fused experts and several shards."""
    directory = tmp_path_factory.mktemp("models") / "mixtral"
    made = random_model("mixtral", num_hidden_layers=BLOCKS)
    return save_with_tokenizer(made, directory, tiny_model, max_shard_size="100KB")


@pytest.fixture
def case(model: Path, calibration: Path, tmp_path: Path) -> Case:
    return Case(model, tmp_path, calibration)


Whole = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The output of an undisturbed run with the given options, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*options: str) -> Path:
        if options not in made:
            case = Case(model, tmp_path_factory.mktemp("whole"), calibration, list(options))
            process = case.run()
            assert process.returncode == 0, process.errors
            made[options] = case.out
        return made[options]

    return make


# ------------------------------------------------------------------------------- kill -9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["besa", "sparsegpt", "wanda"])
def test_killed_at_every_block(case: Case, whole: Whole, method: str):
    case.options = ["--method", method]
    case.kill_when((case.partial / "others.finished.json").exists)
    for block in range(BLOCKS - 1):
        case.kill_when(lambda block=block: case.finished(block))
    process = case.goes_on_to(whole("--method", method))
    for block in range(BLOCKS - 1):
        assert process.errors.count(f"block {block + 1}/{BLOCKS}  finished before, replayed") == 1


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["statistics", "learn", "hand on"])
def test_killed_within_a_block(case: Case, whole: Whole, phase: str):
    for block in range(BLOCKS):
        if case.out.exists():
            break
        process = case.start()
        process.wait_for(lambda block=block: case.reached(block, phase))
        process.send(signal.SIGKILL)
        process.wait()
    if not case.out.exists():
        case.goes_on_to(whole())
    assert digests(case.out) == digests(whole())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random(case: Case, whole: Whole, seed: int):
    chance = random.Random(seed)
    for _ in range(6):
        process = case.start()
        process.wait_for(case.partial.exists)
        time.sleep(chance.expovariate(1 / 0.4))
        process.send(signal.SIGKILL)
        process.wait()
        if case.out.exists():  # perhaps killed after its last rename: then all must be there
            break
    else:
        case.goes_on_to(whole())
    assert digests(case.out) == digests(whole())
    assert_same_record(case.out, whole())


@pytest.mark.slow
def test_killed_while_the_last_files_are_written(case: Case, whole: Whole):
    process = case.start()
    process.wait_for((case.partial / "model.safetensors.index.json").exists)
    process.send(signal.SIGKILL)
    process.wait()
    if not case.out.exists():
        case.goes_on_to(whole())
    assert digests(case.out) == digests(whole())


def test_output_appears_whole(case: Case):
    process = case.start()
    seen = []
    while process.poll() is None:
        seen.append(case.out.exists())
        if seen[-1]:
            break
        time.sleep(0.002)
    assert not any(seen[:-1])
    process.wait()
    names = {path.name for path in case.out.iterdir()}
    assert {"besa.json", "config.json", "report.html", "model.safetensors.index.json"} <= names
    assert not {name for name in names if re.search("finished|settings|lock|writing|activ", name)}


# -------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.slow
@pytest.mark.parametrize("method", ["besa", "wanda"])
def test_interrupted(case: Case, whole: Whole, method: str):
    case.options = ["--method", method]
    process = case.start()
    assert process.wait_for(lambda: case.finished(0))
    process.send(signal.SIGINT)
    assert process.wait() == 130
    line = one_line(process)
    assert "interrupted" in line
    assert str(case.partial) in line
    assert "same command goes on" in line
    assert not case.out.exists()
    case.goes_on_to(whole("--method", method))


# ------------------------------------------------------------------------- other settings


@pytest.mark.slow
def test_other_settings_are_refused_by_name(
    case: Case, whole: Whole, calibration: Path, tiny_model: Path
):
    case.kill_when(lambda: case.finished(0))
    other_text = case.directory / "other.txt"
    other_text.write_text(calibration.read_text()[::-1])
    changes = {
        "method": "wanda",
        "sparsity": "0.6",
        "pattern": "2:4",
        "granularity": "layer",
        "samples": "8",
        "seqlen": "16",
        "epochs": "3",
        "update": "admm",
        "seed": "1",
        "dtype": "bfloat16",
        "include": "mlp",
        "exclude": "q_proj",
        "calibration": str(other_text),
    }
    before = everything(case.partial)
    for name, value in changes.items():
        process = case.run(f"--{name}", value)
        assert process.returncode == 2
        line = one_line(process)
        assert name in line
        assert value in line
        assert "--overwrite" in line
    other_model = Case(tiny_model, case.directory, calibration)
    process = other_model.run()
    assert process.returncode == 2
    assert "model" in one_line(process)
    assert everything(case.partial).keys() == before.keys()
    case.goes_on_to(whole())


@pytest.mark.slow
def test_overwrite_begins_anew_with_other_settings(case: Case, whole: Whole):
    case.kill_when(lambda: case.finished(0))
    process = case.run("--method", "wanda", "--overwrite")
    assert process.returncode == 0, process.errors
    assert "finished before" not in process.errors
    assert digests(case.out) == digests(whole("--method", "wanda"))


@pytest.mark.slow
def test_another_calibration_text_under_the_same_name_is_noticed(case: Case):
    text = case.directory / "text.txt"
    text.write_text(case.calibration.read_text())
    case.calibration = text
    case.kill_when(lambda: case.finished(0))
    text.write_text(text.read_text().upper())
    process = case.run()
    assert process.returncode == 2
    assert "calibration" in one_line(process)


# ------------------------------------------------------------------------------- damage


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_byte, cut, Path.unlink])
@pytest.mark.parametrize("shard", [1, 2])
def test_a_damaged_shard_is_redone(
    case: Case, whole: Whole, damage: Callable[[Path], None], shard: int
):
    case.kill_when(lambda: case.finished(1))
    damage(case.partial / f"model-{shard:05d}-of-{BLOCKS + 1:05d}.safetensors")
    process = case.goes_on_to(whole())
    assert "block 2/3  finished before" in process.errors
    assert ("block 1/3  finished before" in process.errors) == (shard == 1)


@pytest.mark.slow
def test_a_damaged_record_is_a_block_to_redo(case: Case, whole: Whole):
    case.kill_when(lambda: case.finished(1))
    (case.partial / "block-00000.finished.json").write_text('{"file": "model-0')
    (case.partial / "others.finished.json").write_text("{}")
    case.goes_on_to(whole())


def test_damaged_settings_are_said(case: Case):
    case.partial.mkdir()
    (case.partial / "settings.json").write_text("{")
    process = case.run("--method", "magnitude")
    assert process.returncode == 2
    assert str(case.partial) in one_line(process)
    assert case.run("--method", "magnitude", "--overwrite").returncode == 0


# ------------------------------------------------------------------------ others' files


@pytest.mark.slow
def test_two_runs_at_once(case: Case, whole: Whole):
    first = case.start()
    assert first.wait_for((case.partial / "settings.json").exists)
    first.send(signal.SIGSTOP)  # or it might end before the last of them begins
    for more in ([], ["--overwrite"], ["--seed", "1"]):
        second = case.run(*more)
        assert second.returncode == 2
        assert "another besa is writing" in one_line(second)
    first.send(signal.SIGCONT)
    assert first.wait() == 0, first.errors
    assert digests(case.out) == digests(whole())
    assert_same_record(case.out, whole())


@pytest.mark.slow
def test_overwrite_replaces_at_the_end_only(case: Case, whole: Whole):
    case.options = ["--method", "magnitude"]
    assert case.run().returncode == 0
    (case.out / "mine.txt").write_text("")
    before = everything(case.out)
    refused = case.run()
    assert refused.returncode == 2
    assert "not empty" in one_line(refused)
    assert everything(case.out) == before
    assert not case.partial.exists()

    case.options = ["--overwrite"]
    process = case.start()
    assert process.wait_for(lambda: case.finished(0))
    process.send(signal.SIGKILL)
    process.wait()
    assert everything(case.out) == before  # the old output serves until the new one is whole

    leftover = case.directory / "out.replaced"  # of a run that ended while it replaced
    leftover.mkdir()
    (leftover / "config.json").write_text("{}")
    process = case.run()
    assert process.returncode == 0, process.errors
    assert "block 1/3  finished before" in process.errors
    assert digests(case.out) == digests(whole())
    assert not leftover.exists()


def test_an_empty_directory_is_no_obstacle(case: Case):
    case.out.mkdir()
    assert case.run("--method", "magnitude").returncode == 0
    assert (case.out / "besa.json").exists()


def test_a_link_is_refused(case: Case):
    (case.directory / "elsewhere").mkdir()
    case.out.symlink_to("elsewhere")
    process = case.run("--method", "magnitude")
    assert process.returncode == 2
    assert "link" in one_line(process)
    assert not case.partial.exists()


# ------------------------------------------------------------------------------ full disk


@pytest.mark.slow
def test_a_disk_that_fills_up(case: Case, whole: Whole, tmp_path: Path):
    with small_disk(tmp_path / "disk", "8M") as disk:
        case.directory = disk
        process = start(*case.arguments(), cwd=tmp_path)
        assert process.wait_for(lambda: case.finished(0))
        ballast = fill(disk)
        assert process.wait() == 2, process.errors
        line = one_line(process)
        assert "disk is full" in line
        assert "same command" in line
        assert not case.out.exists()
        ballast.unlink()
        process = run(*case.arguments(), cwd=tmp_path)
        assert process.returncode == 0, process.errors
        assert "block 1/3  finished before" in process.errors
        assert digests(case.out) == digests(whole())


def test_a_disk_that_is_too_small(case: Case, tmp_path: Path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        case.directory = disk
        process = run(*case.arguments(), cwd=tmp_path)
        assert process.returncode == 2
        assert "too full" in one_line(process)
        assert not list(disk.iterdir())


@pytest.mark.parametrize(
    ("size", "method"),
    [
        ("3M", ["--method", "magnitude"]),
        ("9M", ["--method", "wanda", "--update", "admm"]),  # the second stream
    ],
    ids=["stream", "two streams"],
)
def test_activations_that_do_not_fit_the_disk(
    case: Case, tmp_path: Path, size: str, method: list[str]
):
    # 1,600 samples of 32 tokens, 32 wide, in float32: 6.5 MB.
    case.calibration = tmp_path / "long.txt"
    case.calibration.write_text("Some words. " * 5000)
    options = [*method, "--samples", "1600", "--activations", "disk"]
    with small_disk(tmp_path / "disk", size) as disk:
        case.directory = disk
        process = run(*case.arguments(*options), cwd=tmp_path)
        assert process.returncode == 2, process.errors
        assert "disk is full" in one_line(process)
        assert not case.out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("largest", [20_000, 75_000])
def test_files_that_may_not_grow(case: Case, whole: Whole, largest: int):
    process = case.run(largest_file=largest)
    assert process.returncode == 2, process.errors
    assert "could not write" in one_line(process)
    assert not case.out.exists()
    case.goes_on_to(whole())


# ---------------------------------------------------------------------------- activations


@pytest.mark.slow
@pytest.mark.parametrize("method", ["besa", "sparsegpt"])
def test_activations_on_disk_give_the_same_bytes(case: Case, whole: Whole, method: str):
    reference = whole("--method", method)
    case.options = ["--method", method, "--activations", "disk"]
    case.goes_on_to(reference)
    assert not list(case.out.glob("*.activations"))


@pytest.mark.slow
def test_a_run_may_go_on_with_its_activations_elsewhere(case: Case, whole: Whole):
    case.options = ["--activations", "disk"]
    case.kill_when(lambda: case.reached(1, "statistics"))
    assert (case.partial / "stream.activations").exists()
    case.options = []
    case.goes_on_to(whole())


# ---------------------------------------------------------------------------------- log


@pytest.mark.slow
def test_log_tells_all_of_it(case: Case):
    case.kill_when(lambda: case.reached(0, "written"))
    shutil.copy(case.partial / "log.jsonl", case.directory / "before.jsonl")
    assert case.run().returncode == 0
    log = (case.out / "log.jsonl").read_text()
    assert log.startswith((case.directory / "before.jsonl").read_text())
    events = [json.loads(line) for line in log.splitlines()]
    written = [event["block"] for event in events if event["phase"] == "written"]
    assert written == list(range(BLOCKS))
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
