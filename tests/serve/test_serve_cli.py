"""`besa serve` before, around and after the engine: what it refuses, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import psutil
import pytest

from besa.formats.config import FORMAT_VERSION
from besa.machine import cores
from tests.helpers import PATIENCE, Process, run
from tests.serve import serving
from tests.serve.serving import ENGINES, PROMPTS, Served, greedy

LOADS = re.compile(r"besa serve: \S+ \S+ loads \S+ \(--verbose shows its log\)")


def refused(process: Process) -> str:
    """The one line of a command that could not be."""
    assert process.returncode == 2, process.errors
    assert process.output == ""
    lines = [line for line in process.errors.splitlines() if not LOADS.fullmatch(line)]
    assert len(lines) == 1, process.errors
    assert lines[0].startswith("besa serve: ")
    return lines[0]


# ------------------------------------------------------------------------- one line, exit code 2


def future(sparse: Path, directory: Path) -> Path:
    """A packed model in a version of the format that is yet to come."""
    shutil.copytree(sparse, directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_bad_models(sparse: Path, tmp_path: Path, dry: list[str]):
    assert "nothing does not exist" in refused(run("serve", "nothing", *dry, cwd=tmp_path))
    (tmp_path / "empty").mkdir()
    line = refused(run("serve", "empty", *dry, cwd=tmp_path))
    assert "empty is no model: it has no config.json" in line
    future(sparse, tmp_path / "future")
    line = refused(run("serve", "future", *dry, cwd=tmp_path))
    assert f"is version {FORMAT_VERSION + 1}, and this besa reads versions 1 to" in line
    assert "upgrade besa" in line
    shutil.copytree(sparse, tmp_path / "cut")
    shard = next((tmp_path / "cut").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "damaged or cut off" in refused(run("serve", "cut", *dry, cwd=tmp_path))
    (tmp_path / "future/config.json").write_text("{")
    assert "config.json is damaged" in refused(run("serve", "future", *dry, cwd=tmp_path))


def test_a_busy_port(sparse: Path, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        line = refused(run("serve", sparse, "--port", port, cwd=tmp_path))
    assert f"port {port} of 127.0.0.1 is in use: give another --port" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "llama.cpp"], "--engine llama.cpp is none of "),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8000"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid cannot be resolved"),
        (["--port", "many"], "--port: invalid int value: 'many'"),
        (["--api-key", ""], "the API key is empty"),
        (["--headless"], "--headless is not for `besa serve`"),
    ],
)
def test_bad_options(options: list[str], words: str, sparse: Path, tmp_path: Path):
    assert words in refused(run("serve", sparse, *options, cwd=tmp_path))


def test_no_vllm(sparse: Path, tmp_path: Path):
    code = (
        "import sys; sys.modules['vllm'] = None; from besa.cli import main\n"
        f"code = main(['serve', {str(sparse)!r}, *sys.argv[1:]])\n"
        "assert 'torch' not in sys.modules  # it takes seconds to import\n"
        "sys.exit(code)"
    )

    def without(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
        )

    result = without("--engine", "vllm")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"besa serve: vLLM is not installed: .*besa\[vllm\].*--engine transformers\n", result.stderr
    )
    result = without("--dry-run")
    assert result.returncode == 0
    assert " besa.serve.engine transformers serve " in result.stdout


# ------------------------------------------------------------------------- --dry-run


@pytest.mark.parametrize("engine", ENGINES)
def test_dry_run(engine: str, sparse: Path, tmp_path: Path):
    process = run(
        *("serve", sparse, "--engine", engine, "--dry-run", "--api-key", "secret"),
        *("--seed", "-1", "--port", 8123, "-q", "two words"),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.errors
    assert process.errors == ""
    assert f" -P -m besa.serve.engine {engine} serve {sparse} --host 127.0.0.1 " in process.output
    assert " --port 8123 --served-model-name sparse " in process.output
    assert process.output.endswith(" --seed -1 -q 'two words'\n")
    assert "VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 " in process.output
    assert "secret" not in process.output


@pytest.mark.skipif(not serving.find_spec("vllm"), reason="vLLM is not installed")
@pytest.mark.parametrize("backend", [[], ["mp"], ["ray"]])
def test_dry_run_of_several_ranks(backend: list[str], sparse: Path, tmp_path: Path):
    """For vLLM's own executors, by its own flags; the cores of this machine if all are here."""
    flags = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"]
    flags += [part for name in backend for part in ("--distributed-executor-backend", name)]
    process = run("serve", sparse, "--engine", "vllm", "--dry-run", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert process.output.endswith(f" {' '.join(flags)}\n")
    assert ("VLLM_CPU_KVCACHE_SPACE" in process.output) == (backend != ["ray"])


# ------------------------------------------------------------------------- engines that fail


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_flag_that_the_engine_lacks(engine: str, sparse: Path, tmp_path: Path):
    line = refused(
        run("serve", sparse, "--engine", engine, "--port", 0, "--no-such-flag", cwd=tmp_path)
    )
    assert line.startswith(f"besa serve: {engine} did not start: ")
    assert "--no-such-flag" in line
    assert line.endswith(" (--verbose shows its log)")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_the_engine_cannot_load(engine: str, sparse: Path, tmp_path: Path):
    shutil.copytree(sparse, tmp_path / "odd")
    path = tmp_path / "odd/config.json"
    path.write_text(path.read_text().replace('"hidden_size": 160', '"hidden_size": 192'))
    process = run("serve", "odd", "--engine", engine, "--port", 0, cwd=tmp_path)
    line = refused(process)
    assert line.startswith(f"besa serve: {engine} did not start: ")
    assert re.search("160|192", line), line


@pytest.mark.slow
def test_verbose_shows_the_log(sparse: Path, tmp_path: Path):
    process = run(
        *("serve", sparse, "--engine", "transformers", "--port", 0),
        *("--verbose", "--dtype", "float3"),
        cwd=tmp_path,
    )
    assert process.returncode == 2
    lines = process.errors.splitlines()
    assert lines[0].startswith("besa serve: runs VLLM_NO_USAGE_STATS=1 ")
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith("besa serve: transformers did not start: ")


# ------------------------------------------------------------------------- ends


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_told_to_stop_while_it_starts(engine: str, sparse: Path, tmp_path: Path):
    served = serving.start(engine, sparse, tmp_path)
    try:
        served.wait_for(lambda: " loads sparse" in served.errors)
        served.wait_for(served.processes)
        processes = served.processes()
        served.process.send_signal(signal.SIGTERM)
        assert served.end() == 0
        assert served.errors.splitlines()[1:] == ["besa serve: stopped at once"]
        assert served.output == ""
        assert serving.gone(processes)
    finally:
        serving.finish(served)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_besa_is_killed(engine: str, sparse: Path, dense: Path, tmp_path: Path):
    """No engine is left behind. Until then: a key by its flag, another name, two ranks."""
    flags = ["--api-key", "secret", "--served-model-name", "mine", "--shutdown-timeout", 1]
    flags += ["--dtype", "float32"]
    if engine == "vllm":
        flags += ["--enforce-eager", "--tensor-parallel-size", min(2, cores())]
    served = serving.start(engine, sparse, tmp_path, *flags)
    try:
        serving.ready(served)
        client = served.client("secret")
        assert [model.id for model in client.models.list().data] == ["mine"]
        answer = client.completions.create(
            model="mine", prompt=PROMPTS[0], max_tokens=8, temperature=0
        )
        assert answer.choices[0].text == greedy(dense, PROMPTS[0], 8)
        with pytest.raises(openai.AuthenticationError):
            served.client("other").models.list()
        processes = served.processes()
        assert processes
        served.process.kill()
        assert serving.gone(processes)
    finally:
        serving.finish(served)


def streams(served: Served, number: int) -> list[http.client.HTTPResponse]:
    """Long answers that have all begun."""
    asked = {"model": "sparse", "prompt": "def ", "max_tokens": 240, "ignore_eos": True}
    body = json.dumps({**asked, "stream": True})
    answers = []
    for _ in range(number):
        connection = http.client.HTTPConnection(
            served.url.removeprefix("http://"), timeout=PATIENCE
        )
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        answers.append(connection.getresponse())
    for answer in answers:
        assert answer.readline().startswith(b"data: ")
    return answers


def rest_of(answer: http.client.HTTPResponse) -> bytes:
    """Up to its end, or to where it is cut off."""
    rest = b""
    with contextlib.suppress(http.client.IncompleteRead, ConnectionResetError):
        while part := answer.read1():
            rest += part
    return rest


@pytest.mark.slow
def test_ctrl_c(sparse: Path, tmp_path: Path):
    """As a terminal sends it, to all of a process group; the second one does not wait."""
    served = serving.start("transformers", sparse, tmp_path, "--shutdown-timeout", 60)
    try:
        serving.ready(served)
        processes = served.processes()
        answers = streams(served, 8)  # so many that they take long
        os.killpg(served.process.pid, signal.SIGINT)
        served.wait_for(lambda: "finishes what it has begun" in served.errors)
        assert [p.status() for p in processes if p.is_running()]
        os.killpg(served.process.pid, signal.SIGINT)
        assert not all(b"[DONE]" in rest_of(answer) for answer in answers)
        assert served.end() == 0
        assert serving.gone(processes)
    finally:
        serving.finish(served)


@pytest.mark.slow
def test_no_patience(sparse: Path, tmp_path: Path):
    """With no time to finish, what has begun is cut off."""
    served = serving.start("transformers", sparse, tmp_path, "--shutdown-timeout", 0)
    try:
        serving.ready(served)
        answers = streams(served, 8)  # so many that they take long
        served.process.send_signal(signal.SIGTERM)
        assert not all(b"[DONE]" in rest_of(answer) for answer in answers)
        assert served.end() == 0
    finally:
        serving.finish(served)


@pytest.mark.slow
def test_an_engine_that_dies(sparse: Path, tmp_path: Path):
    served = serving.start("transformers", sparse, tmp_path)
    try:
        serving.ready(served)
        children = psutil.Process(served.process.pid).children()
        [engine] = [child for child in children if "besa.serve.engine" in child.cmdline()]
        engine.kill()
        assert served.end() == 1
        assert served.errors.splitlines()[-1] == (
            "besa serve: transformers ended by itself (SIGKILL)"
        )
    finally:
        serving.finish(served)
