"""`besa bench` as users start it, against servers whose delays and faults are known."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from besa.bench.generator import CLIENTS
from besa.bench.random_models import SHAPES
from besa.processes.usage import family
from besa.serve.vllm.engine import vllm_version
from tests.bench.stubs import bench, entries, lateness, start_bench, stub
from tests.helpers import PATIENCE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None and importlib.util.find_spec("guidellm") is None,
    reason="no load generator is installed",
)

GENERATORS = [name for name in CLIENTS if importlib.util.find_spec(name) is not None]
QUICK = ("--input-len", 16, "--output-len", 8, "--requests", 4, "--warmup", 1)


Run = tuple[Any, dict[str, Any], Path]


def against_stubs(folder: Path, servers: dict[str, tuple[object, ...]], *more: object) -> Run:
    """A run against stub servers, by their names."""
    with ExitStack() as stack:
        urls = [f"--url={name}={stack.enter_context(stub(*x))}" for name, x in servers.items()]
        done, results = bench(folder / "out", *urls, *QUICK, *more)
    return done, results, folder


ROUNDS = 5


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run against sound servers, and what they really did."""
    folder = tmp_path_factory.mktemp("sound")
    slow = ("--ttft", 0.1, "--itl", 0.02)
    return against_stubs(
        folder,
        {
            "dense": (*slow, "--journal", folder / "dense.jsonl"),
            "sparse": ("--ttft", 0.05, "--itl", 0.01, "--salt", "s"),
            "same": (*slow, "--journal", folder / "same.jsonl"),
        },
        *("--concurrency", "1,2", "--rate", "8", "--rounds", ROUNDS),
    )


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run with every fault there is, and a sound server, whose objective is looked for.

    Two at a time, 0.1 s each: 20 requests a second, and beyond that they wait.
    """
    folder = tmp_path_factory.mktemp("faulty")
    sound = ("--ttft", 0.03, "--itl", 0.01, "--slots", 2, "--journal", folder / "sound.jsonl")
    return against_stubs(
        folder,
        {
            "sound": sound,
            "dying": ("--fault", "die", "--after", 12),
            "hanging": ("--fault", "hang", "--after", 12),
            "failing": ("--fault", "error", "--after", 12),
            "fickle": ("--fault", "unstable"),
        },
        *("--url=absent=http://127.0.0.1:9", "--concurrency", "1", "--rounds", 3, "--timeout", 10),
        *("--slo", "ttft=100ms"),
    )


@pytest.mark.alone
@pytest.mark.slow
def test_figures_are_right_within_two_percent_or_a_millisecond(
    compared: Run,
) -> None:
    """Against what the server did; and, as it is told to, against what it was asked to do."""
    _, results, folder = compared
    counted = [line for line in entries(folder / "dense.jsonl") if len(line["sent"]) == 8]
    late = lateness(folder / "dense.jsonl")
    truth = {
        "ttft_p50": statistics.median(x["sent"][0] - x["received"] for x in counted),
        "itl_p50": statistics.median(
            b - a for x in counted for a, b in zip(x["sent"], x["sent"][1:], strict=False)
        ),
        "e2e_p50": statistics.median(x["sent"][-1] - x["received"] for x in counted),
    }
    nominal = {"ttft_p50": 0.1, "itl_p50": 0.02, "e2e_p50": 0.1 + 7 * 0.02}
    measured = next(m for m in results["measurements"] if m["contender"] == "dense")["summary"]
    for name, true in truth.items():
        allowed = max(0.02 * true, 0.001) + 2 * late
        assert measured[name]["median"] == pytest.approx(true, abs=allowed), name
        assert measured[name]["median"] == pytest.approx(nominal[name], abs=2 * allowed), name
    rate = 8 / nominal["e2e_p50"]
    allowed = 0.05 + 2 * late / nominal["e2e_p50"]
    assert measured["output_tps"]["median"] == pytest.approx(rate, rel=allowed)


@pytest.mark.alone
@pytest.mark.slow
def test_gains(compared: Run) -> None:
    _, results, folder = compared
    assert results["reference"] == "dense"
    late = lateness(folder / "dense.jsonl")
    for load in ("1 at a time", "2 at a time"):
        gains = results["comparisons"]["sparse"][load]
        for name in ("ttft_p50", "itl_p50", "e2e_p50", "output_tps"):
            assert gains[name]["median"] == pytest.approx(2, rel=0.1 + 2 * late / 0.01), name
            assert gains[name]["verdict"] == "better", name
        same = results["comparisons"]["same"][load]
        assert same["e2e_p50"]["median"] == pytest.approx(1, abs=0.03 + 2 * late / 0.24)


@pytest.mark.alone
@pytest.mark.slow
def test_contenders_get_the_same_requests_at_the_same_times(compared: Run) -> None:
    """None of them twice. Those of the rate come last, at random times."""
    _, results, folder = compared
    journals = [folder / "dense.jsonl", folder / "same.jsonl"]
    asked = [entries(journal) for journal in journals]
    assert_same_prompts(asked)
    loads = {"1 at a time": 4, "2 at a time": 8, "8 requests/s": 4}
    found = {m["load"]: m for m in results["measurements"] if m["contender"] == "dense"}
    assert found.keys() == loads.keys()
    for load, count in loads.items():
        assert_as_asked(found[load], ROUNDS * count, asked[0], max(map(lateness, journals)))
    arrivals = [sorted(x["received"] for x in lines[-4:]) for lines in asked]
    gaps = [[y - x for x, y in itertools.pairwise(one)] for one in arrivals]
    assert gaps[0] == pytest.approx(gaps[1], abs=0.06 + 4 * max(map(lateness, journals)))
    assert max(gaps[0]) - min(gaps[0]) > 0.03


def assert_as_asked(
    found: dict[str, Any], requests: int, asked: list[dict[str, Any]], late: float
) -> None:
    """Figures of a server of 0.1 s and 0.02 s a token, against what it did.

    With room for a busy machine: the test above is the strict one.
    """
    counted = [line for line in asked if len(line["sent"]) == 8]
    true = statistics.median(x["sent"][-1] - x["received"] for x in counted)
    assert found["requests"] == requests
    assert found["output_tokens"] == [8, 8]
    e2e, itl = (found["summary"][name]["median"] for name in ("e2e_p50", "itl_p50"))
    assert e2e == pytest.approx(true, abs=0.05 * true + 2 * late)
    assert itl == pytest.approx(0.02, abs=0.002 + 2 * late)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif("guidellm" not in GENERATORS, reason="guidellm is not installed")
def test_guidellm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the other generator. Its processes begin when they have got going, not by the schedule."""
    # guidellm looks often whether all is over, and loses each time's last answer if we let it.
    monkeypatch.setenv("GUIDELLM__MP_POLL_INTERVAL", "0.001")
    slow = ("--ttft", 0.1, "--itl", 0.02)
    journals = [tmp_path / "a", tmp_path / "b"]
    done, results, _ = against_stubs(
        tmp_path,
        {journal.name: (*slow, "--journal", journal) for journal in journals},
        *("--rate", 8, "--rounds", 1, "--generator", "guidellm"),
    )
    assert done.returncode == 0, done.stderr
    asked = [entries(journal) for journal in journals]
    assert_same_prompts(asked)
    [found] = [m for m in results["measurements"] if m["contender"] == "a"]
    assert_as_asked(found, 4, asked[0], max(map(lateness, journals)))


def assert_same_prompts(asked: list[list[dict[str, Any]]]) -> None:
    """All servers got the same prompts, none of them twice."""
    prompts = [sorted(line["prompt"] for line in lines) for lines in asked]
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) == len(prompts[0])


@pytest.mark.alone
@pytest.mark.slow
def test_the_objective_is_found(faulty: Run) -> None:
    _, results, folder = faulty
    found = results["slo"]["rates"]["sound"]
    slower = 1 + 8 * lateness(folder / "sound.jsonl") / 0.1  # each answer, on a busy machine
    assert 8 / slower < found["rate"] < found["above"] < 45


@pytest.mark.slow
def test_broken_contenders_are_named_and_counted_nowhere(
    faulty: Run,
) -> None:
    done, results, folder = faulty
    assert done.returncode == 1
    broken = {one["name"]: one["broken"] for one in results["contenders"] if one["broken"]}
    assert set(broken) == {"dying", "hanging", "failing", "fickle", "absent"}
    assert "no answer within 10 s" in broken["hanging"]
    assert "status 500" in broken["failing"] or "requests failed" in broken["failing"]
    assert "otherwise than before" in broken["fickle"]
    assert "cannot be reached" in broken["absent"]
    page = (folder / "out" / "report.html").read_text()
    for name in broken:
        assert name in page
        assert f"{name} is broken" in done.stdout
    measured = {m["contender"] for m in results["measurements"]}
    assert measured == {"sound"}
    assert results["comparisons"] == {}


@pytest.mark.slow
def test_files(compared: Run) -> None:
    done, results, folder = compared
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "report.html",
        "results.csv",
        "results.json",
    ]
    assert results["schema_version"] == 1
    assert results["settings"]["rounds"] == ROUNDS
    assert results["machine"]["cores"] >= 1
    assert results["versions"]["besa"]
    with (folder / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * ROUNDS
    first = results["measurements"][0]
    own = [r for r in rows if (r["contender"], r["load"]) == (first["contender"], first["load"])]
    assert [float(r["e2e_p50"]) for r in own] == [r["e2e_p50"] for r in first["rounds"]]
    same = {one["name"]: one["same_answers"] for one in results["contenders"]}
    assert same["same"] == 1
    assert same["sparse"] == 0
    assert "no difference" in done.stdout or "1.0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(  # SIGTERM is below
    ("number", "generator"), [*zip([signal.SIGKILL, signal.SIGINT], GENERATORS[::-1], strict=False)]
)
def test_nothing_is_left(tmp_path: Path, number: signal.Signals, generator: str) -> None:
    with stub("--itl", 0.2) as url:
        process = start_bench(
            tmp_path / "out", f"--url=one={url}", "--output-len", 64, "--generator", generator
        )
        assert process.stderr is not None
        for line in process.stderr:
            if "round 1" in line:
                break
        # A watchdog and the generator; guidellm forks more of them for each measurement.
        wanted = 5 if generator == "guidellm" and number != signal.SIGINT else 2
        while len(children := set(family(process.pid)) - {process.pid}) < wanted:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
    expected = -number if number == signal.SIGKILL else 130
    assert process.returncode == expected
    assert "Traceback" not in errors
    wait_for_the_end(children)
    assert list(tmp_path.iterdir()) == []


def wait_for_the_end(pids: Iterable[int]) -> None:
    """Of processes that are not this one's children; a zombie has ended."""
    deadline = time.monotonic() + PATIENCE
    while left := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < deadline, f"{left} do not end"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_servers_that_were_started_are_gone(tmp_path: Path, tiny_model: Path) -> None:
    """While an engine starts, and its parent is told to end."""
    process = start_bench(tmp_path / "out", tiny_model, "--engine", "transformers")
    assert process.stderr is not None
    for line in process.stderr:
        if "starts" in line:
            break
    while not (engines := _engines(process.pid)):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.05)
    time.sleep(1)
    process.terminate()
    process.communicate(timeout=PATIENCE)
    wait_for_the_end(engines)


def _engines(pid: int) -> list[int]:
    found = []
    for each in family(pid):
        try:
            if b"besa.serve.engine" in Path(f"/proc/{each}/cmdline").read_bytes():
                found.append(each)
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_real_engine(tmp_path: Path, tiny_model: Path) -> None:
    """From the model to the page: served, measured, weighed, and its perplexity."""
    text = tmp_path / "text.txt"
    text.write_text("It is said that one day " * 100)
    done, results = bench(
        tmp_path / "out", f"sparse={tiny_model}", "--against", f"dense={tiny_model}",
        "--engine", "transformers", *QUICK, "--concurrency", "1", "--rounds", 2,
        "--text", text, "--windows", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for one in results["contenders"]:
        assert one["engine"] == "transformers"
        assert one["broken"] is None
        assert one["start_seconds"] > 0
        assert one["disk_bytes"] == (tiny_model / "model.safetensors").stat().st_size
        assert 2**26 < one["memory"]["steady"] <= one["memory"]["peak"]
        assert one["perplexity"]["perplexity"] > 1
        assert one["idle_cores"] < 0.5
    assert results["contenders"][1]["same_answers"] == 1
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")
def test_a_random_shape_in_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Made, packed, served by the real engine with the flags asked for, and removed."""
    shape = {**SHAPES["tinyllama"], "num_hidden_layers": 2, "hidden_size": 128}
    shape |= {"intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"vocab_size": 512, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    temporary = tempfile.mkdtemp()  # vLLM's sockets are here, whose paths have 107 characters
    request.addfinalizer(lambda: shutil.rmtree(temporary))
    monkeypatch.setenv("TMPDIR", temporary)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    done, results = bench(
        tmp_path / "out", "--shape", tmp_path / "config.json", "--pattern", "2:4",
        "--engine", "vllm", "--engine-args=--enforce-eager --max-model-len 64", "--rounds", 1,
        "--input-len", 8, "--output-len", 4, "--requests", 2, "--concurrency", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one["name"] for one in results["contenders"]] == ["dense", "2:4"]
    for one in results["contenders"]:
        assert one["engine"] == "vllm"
        assert one["random_weights"]
        assert one["flags"] == ["--enforce-eager", "--max-model-len", "64"]
        assert one["perplexity"] is None
    assert results["contenders"][1]["packing"]["pattern"] == "2:4"
    assert results["quality"]["skipped"] == "random weights have no quality"
    assert all(m["output_tokens"] == [4, 4] for m in results["measurements"])
    assert "Random weights" in (tmp_path / "out" / "report.html").read_text()
    assert not list(Path(temporary).glob("besa-bench-*"))


@pytest.mark.slow
def test_offline_on_a_random_shape(tmp_path: Path, tiny_model: Path) -> None:
    done, results = bench(
        tmp_path / "out", "--shape", tiny_model / "config.json", "--sparsity", 0.75, "--offline",
        "--engine", "transformers", "--batch", "1,2", "--input-len", 8, "--output-len", 4,
        "--rounds", 5, "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one["name"] for one in results["contenders"]] == ["dense", "75%"]
    assert all(one["random_weights"] for one in results["contenders"])
    assert results["contenders"][1]["disk_bytes"] < 0.8 * results["contenders"][0]["disk_bytes"]
    assert {m["load"] for m in results["measurements"]} == {"batch 1", "batch 2"}
    for m in results["measurements"]:
        for figures in m["rounds"]:
            batch = int(m["load"].split()[1])
            assert figures["decode_tps"] == pytest.approx(batch / figures["step"])
    assert "Random weights" in done.stdout
    assert "Random weights" in (tmp_path / "out" / "report.html").read_text()
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to measure"),
        (("--url", "x"), "is not NAME=URL"),
        (("--url", "a=http://h", "--url", "a=http://i"), "two contenders are called a"),
        (("--url", "a=http://h", "--slo", "ttft=5"), "is not like ttft=500ms"),
        (("--url", "a=http://h", "--concurrency", "1.5"), "no such number"),
        (("--url", "a=http://h", "--rate", "x"), "no such number"),
        (("--url", "a=http://h", "--rounds", "0"), "--rounds is 0"),
        (("--url", "a=http://h", "--prompts", "absent.txt"), "cannot be read"),
        (("--url", "a=http://h", "--generator", "wrk"), "is none of vllm, guidellm"),
        (("--url", "a=http://h", "--offline"), "measures models"),
        (("absent-directory/",), "is no directory here"),
        (("--shape", "gpt-9"), "is none of tinyllama"),
        (("--shape", "tinyllama", "--pattern", "4:2"), "is neither unstructured nor N:M"),
        (("--against", "x"), "needs a model before it"),
        (("compare", "a.json"), "compare takes two files"),
        (("compare", "a.json", "b.json"), "cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from besa.cli import main

    code = main(["bench", *arguments, "--out", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert code == 2
    assert words in errors
    assert len([x for x in errors.splitlines() if x.startswith("besa bench:")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_results_are_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from besa.cli import main

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    assert main(["bench", "--url", "a=http://h", "--out", str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err
