"""Several processes prune and evaluate like one: the same masks, one voice, no hang, resumable."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from besa.errors import BesaError
from besa.model.conditions import check_alike
from besa.processes.launch import Launch
from besa.processes.ranks import Ranks
from besa.pruning.config import PruneConfig
from besa.pruning.sharing import check_shareable
from tests.agents import Torchrun, workers
from tests.helpers import (
    Process,
    digests,
    random_model,
    record_of,
    run,
    save_with_tokenizer,
    start,
    stored,
)
from tests.pruning.output import Output

BLOCKS = 2


class Case(Output):
    """A command and where its output goes."""

    def arguments(self) -> list[object]:
        """9 samples: 8 are learned from, in steps of 3, and 1 is held out; nothing divides well."""
        given = {"--out": self.out, "--calibration": self.calibration, "--seqlen": 32}
        given |= {"--samples": 9, "--step-samples": 3, "--device": "cpu"}
        flat = [part for pair in given.items() for part in pair]
        return ["prune", self.model, *flat, *self.options]

    def run(self, launch: Torchrun | None = None) -> Process:
        return run(*self.arguments(), cwd=self.directory, launch=launch)

    def start(self, launch: Torchrun | None = None, env: dict[str, str] | None = None) -> Process:
        return start(*self.arguments(), cwd=self.directory, launch=launch, env=env)


def agreement(ours: Path, theirs: Path) -> float:
    """The share of weights that both checkpoints keep or both prune."""
    pairs = [(tensor, stored(theirs)[name]) for name, tensor in stored(ours).items()]
    same = sum(int(((a == 0) == (b == 0)).sum()) for a, b in pairs)
    return same / sum(a.numel() for a, _ in pairs)


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    return save_with_tokenizer(random_model("llama"), directory, tiny_model)


@pytest.fixture
def case(model: Path, calibration: Path, tmp_path: Path) -> Case:
    return Case(model, tmp_path, calibration)


@dataclass(frozen=True)
class Runs:
    """The same command by one, by two and by four processes."""

    one: Path
    two: Path
    four: Path
    of_two: Process


@pytest.fixture(scope="module")
def runs(model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("runs")
    outs, processes = [], []
    for name, launch in (("one", None), ("two", Torchrun(2)), ("four", Torchrun(4))):
        case = Case(model, directory, calibration, name=name)
        processes.append(case.run(launch))
        assert processes[-1].returncode == 0, processes[-1].errors
        outs.append(case.out)
    return Runs(*outs, processes[1])


@pytest.mark.slow
def test_several_processes_prune_like_one(runs: Runs):
    one = record_of(runs.one)
    for count, out in ((2, runs.two), (4, runs.four)):
        assert agreement(runs.one, out) >= 0.999
        record = record_of(out)
        assert record["processes"] == count
        assert record["settings"] == one["settings"]
        assert record["sparsity"] == one["sparsity"]
        for ours, theirs in zip(record["blocks"], one["blocks"], strict=True):
            assert ours["error"] == pytest.approx(theirs["error"], rel=0.02)
            assert ours["error_wanda"] == pytest.approx(theirs["error_wanda"], rel=0.001)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.001)
    assert "processes" not in one


@pytest.mark.slow
def test_experts_that_a_process_does_not_see(case: Case, tiny_model: Path):
    case.model = save_with_tokenizer(random_model("mixtral"), case.directory / "m", tiny_model)
    case.options = ["--update", "admm", "--seqlen", "6"]
    records = []
    for name, launch in (("one", None), ("two", Torchrun(2))):
        case.name = name
        process = case.run(launch)
        assert process.returncode == 0, process.errors
        records.append(record_of(case.out))
    assert agreement(case.directory / "one", case.directory / "two") >= 0.999
    tokens = [
        [x.get("expert_tokens") for block in record["blocks"] for x in block["linears"]]
        for record in records
    ]
    assert tokens[0] == tokens[1]
    assert any(tokens[0])


@pytest.mark.slow
def test_high_effort_trains_together(case: Case):
    case.options = ["--effort", "high", "--rotate", "off", "--step-samples", "4"]
    records = []
    for name, launch in (("one", None), ("two", Torchrun(2))):
        case.name = name
        process = case.run(launch)
        assert process.returncode == 0, process.errors
        records.append(record_of(case.out)["recovery"])
    assert agreement(case.directory / "one", case.directory / "two") >= 0.999
    assert records[1]["before"] == pytest.approx(records[0]["before"], rel=0.02)
    assert records[1]["after"] == pytest.approx(records[0]["after"], rel=0.02)
    assert records[1]["after"] < records[1]["before"]
    assert not list(case.directory.glob("*.p*"))


@pytest.mark.slow
def test_one_process_speaks(runs: Runs):
    lines = runs.of_two.errors.splitlines()
    assert sum("besa prune: 2 processes share steps of 3 samples" in line for line in lines) == 1
    assert [bool(re.match(rf"block \d/{BLOCKS}  ", line)) for line in lines].count(True) == BLOCKS
    assert runs.of_two.output.count("weights pruned") == 1


@pytest.mark.slow
def test_a_killed_process_ends_all_and_one_process_goes_on(case: Case, runs: Runs):
    process = case.start(Torchrun(2))
    assert process.wait_for(lambda: case.finished(0)), process.errors
    group = workers(process.pid)
    group[-1].kill()
    assert process.wait() != 0
    assert not psutil.wait_procs(group, timeout=0)[1]
    assert not case.out.exists()
    assert process.errors.count("another process of the group ended") <= 1
    assert not re.search("^Traceback", process.errors, flags=re.M)

    gone_on = case.run()
    assert gone_on.returncode == 0, gone_on.errors
    assert gone_on.errors.count("finished before, replayed") == 1
    assert agreement(runs.one, case.out) >= 0.999
    assert not case.partial.exists()


@pytest.mark.slow
def test_torchruns_restart_goes_on_and_a_number_of_processes_gives_the_same_bytes(
    case: Case, runs: Runs
):
    process = case.start(Torchrun(2, max_restarts=1))
    assert process.wait_for(lambda: case.finished(0)), process.errors
    workers(process.pid)[0].send_signal(signal.SIGKILL)  # the one that holds the lock
    assert process.wait() == 0, process.errors
    assert process.errors.count("finished before, replayed") == 1
    assert digests(case.out) == digests(runs.two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--samples", "1"],
            "2 processes need as many samples to learn from, not 1: give more --sam",
        ),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
    ids=["while they are joined", "before they are"],
)
def test_an_error_is_one_line_once(case: Case, options: list[str], said: str):
    case.options = options
    process = case.run(Torchrun(2))
    ours = [line for line in process.errors.splitlines() if line.startswith("besa prune")]
    assert len(ours) == 1, process.errors
    assert said in ours[0]
    assert "exitcode  : 2" in process.errors
    assert not case.out.exists()


def test_a_training_that_cannot_be_shared_is_refused():
    two = Ranks(Launch(0, 2))
    with pytest.raises(BesaError, match=r"steps of 3 samples, which 2 .* give --step-samples 4$"):
        check_shareable(PruneConfig(out="out", effort="high", step_samples=3), two)
    check_shareable(PruneConfig(out="out", effort="high", step_samples=6), two)
    check_shareable(PruneConfig(out="out", effort="high", quantize="int8"), two)  # not trained


def test_machines_that_differ_are_told(monkeypatch: pytest.MonkeyPatch):
    two, settings = Ranks(Launch(0, 2)), {"torch": "2.13.0", "threads": 1}
    for name, value, said in (
        ("torch", "2.12.1", "process 1 has torch = 2.12.1"),
        ("threads", 8, ""),
    ):
        theirs = {**settings, name: value}
        monkeypatch.setattr(Ranks, "gather", lambda _, own, theirs=theirs: [own, theirs])
        with pytest.raises(BesaError, match=said) if said else nullcontext():
            check_alike(settings, two)


@pytest.mark.slow
def test_other_commands_are_one_processs_work(case: Case):
    process = run("export", case.model, "--out", case.out, cwd=case.directory, launch=Torchrun(2))
    assert process.errors.count("besa export: it is one process's work") == 1


@pytest.mark.slow
def test_evaluation_is_the_same(model: Path, runs: Runs, tmp_path: Path):
    command = ["eval", model, runs.one, "--seqlen", 32, "--limit", 5, "--json", "--device", "cpu"]
    one = run(*command, cwd=tmp_path)
    assert one.returncode == 0, one.errors
    two = run(*command, cwd=tmp_path, launch=Torchrun(2))
    assert two.returncode == 0, two.errors
    assert json.loads(two.output) == json.loads(one.output)


# ------------------------------------------------------------------------------ two machines


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces, `a` with 10.77.0.1 and `b` with 10.77.0.2, joined by a cable."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here")
    a, b = names = "besa-test-a", "besa-test-b"

    def ip(*words: str) -> int:
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode

    try:
        if any(ip("netns", "add", name) for name in names):
            pytest.skip("this machine lets nobody make network namespaces")
        ends = ("link", "add", "besa0", "netns", a, "type", "veth", "peer", "name", "besa0")
        if ip(*ends, "netns", b):
            pytest.skip("this machine lets nobody join network namespaces")
        for number, name in enumerate(names, start=1):
            inside = ("-n", name)
            assert not ip(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", "besa0")
            assert not ip(*inside, "link", "set", "besa0", "up")
            assert not ip(*inside, "link", "set", "lo", "up")
        yield a, b
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_two_machines(case: Case, runs: Runs, machines: tuple[str, str]):
    agents = []
    for number, network in enumerate(machines, start=1):
        launch = Torchrun(
            nproc_per_node=1,
            nnodes=2,
            rdzv_endpoint="10.77.0.1:29677",  # of a network of its own
            is_host=number == 1,
            network=network,
            address=f"10.77.0.{number}",
        )
        agents.append(case.start(launch, env={"GLOO_SOCKET_IFNAME": "besa0"}))
    assert [agent.wait() for agent in agents] == [0, 0], [agent.errors for agent in agents]
    assert digests(case.out) == digests(runs.two)
