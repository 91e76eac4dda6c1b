"""`besa serve --engine onnx`: an ONNX model on packed weights, asked as the other engines are.

What every engine has to do is in test_serve.py, whose tests run here once more with this server;
below is what is its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from besa.errors import BesaError
from besa.export import ExportConfig, export
from besa.export.onnx.runtime import NAME, ort_library
from besa.serve.cpu import threads
from besa.serve.onnx.generation import OnnxBackend
from tests.helpers import run
from tests.serve import serving
from tests.serve.conformance import (  # noqa: F401 - collected here
    test_langchain,
    test_llama_index,
    test_nodes_client,
    test_the_same_answers,
    test_the_same_refusals,
)
from tests.serve.serving import NEW_TOKENS, PROMPTS, Served
from tests.serve.test_serve import (  # noqa: F401 - collected here
    KEY,
    test_another_mask_is_caught,
    test_bad_chats,
    test_bad_requests,
    test_by_chance,
    test_chat,
    test_completions,
    test_json,
    test_logprobs,
    test_many_of_whom_half_give_up,
    test_models_health_and_metrics,
    test_no_key,
    test_no_such_thing,
    test_stop_strings,
    test_streamed,
    test_streamed_chat,
    test_streams_end_as_the_protocol_says,
    test_the_curl_line,
    test_the_end_of_a_text,
    test_the_key_is_on_no_command_line,
    test_this_machine_only,
    test_what_else_is_in_an_answer,
    test_what_it_prints,
    test_wrong_keys,
)
from tests.serve.test_serve_cli import refused

try:
    ort_library()
except BesaError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def graph(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "sparse"
    return export(dense, ExportConfig(out=out, format="onnx", sparse=True)).out


@pytest.fixture(scope="module")
def server(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = serving.start("onnx", graph, tmp_path_factory.mktemp("onnx"), BESA_API_KEY=KEY)
    served.key = KEY
    try:
        yield serving.ready(served)
    finally:
        serving.finish(served)


def test_a_thread_for_each_core(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("besa.serve.cpu.core_share", lambda: None)
    monkeypatch.setattr("besa.serve.cpu.physical_cores", lambda: [[0, 2, 4], [6]])
    assert threads() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads() == 3
    monkeypatch.setattr("besa.serve.cpu.core_share", lambda: 1.5)
    assert threads() == 2


def test_nothing_reports_home(server: Served):
    environments = [process.environ() for process in server.processes()]
    known = [environment for environment in environments if "BESA_SHUTDOWN_TIMEOUT" in environment]
    assert known
    for environment in known:
        for name in ("ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY"):
            assert environment[name] == "1"


def test_by_the_engines_own_chance(server: Served):
    def says(**sampling: float) -> str:
        answer = server.client().completions.create(
            model="sparse", prompt=PROMPTS[0], max_tokens=NEW_TOKENS, **sampling
        )
        return str(answer.choices[0].text)

    assert len({says(temperature=1.5) for _ in range(4)}) > 1
    assert says(temperature=1.0, top_p=1e-6) == says(temperature=0)


def test_a_load_generator_gets_as_many_tokens_as_it_asks_for(server: Served):
    """Past the end of the text, too, and told how many they were."""
    asked = {"model": "sparse", "prompt": "def ", "max_tokens": 200, "ignore_eos": True}
    status, text = server.request("POST", "/v1/completions", {**asked, "temperature": 0})
    assert status == 200
    assert json.loads(text)["usage"]["completion_tokens"] == 200
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    _, text = server.request("POST", "/v1/completions", streamed)
    *_, usage, _ = [event for event in text.split("\n\n") if event]
    assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 200


def test_prompts_of_tokens(server: Served):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(serving.MODEL)(PROMPTS[0])["input_ids"]
    answer = server.client().completions.create(
        model="sparse", prompt=tokens, max_tokens=NEW_TOKENS, temperature=0
    )
    assert answer.choices[0].text == server.says(PROMPTS[0])
    for prompt in ([1 << 20], [True], [-1], [], ["a", 5]):
        body = {"model": "sparse", "prompt": prompt}
        assert server.request("POST", "/v1/completions", body)[0] == 400, prompt


def test_who_gives_up_costs_nothing_more(server: Served):
    serving.rests(server)


def test_sigterm_lets_it_finish(server: Served, dense: Path):
    """The last of this server."""
    serving.finishes(server, dense)


def test_engines_and_models_that_do_not_fit(graph: Path, dense: Path, tmp_path: Path):
    line = refused(run("serve", dense, "--engine", "onnx", "--dry-run", cwd=tmp_path))
    assert "is no ONNX model: `besa export --format onnx` makes one" in line
    line = refused(run("serve", graph, "--engine", "vllm", "--dry-run", cwd=tmp_path))
    assert "is an ONNX model: serve it with --engine onnx" in line
    process = run("serve", graph, "--dry-run", cwd=tmp_path)  # the model says which
    assert "besa.serve.engine onnx serve" in process.output
    assert "ORT_DISABLE_TELEMETRY=1" in process.output


def test_models_that_are_damaged(graph: Path, tmp_path: Path):
    shutil.copytree(graph, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.onnx.data", 100_000)
    line = refused(run("serve", "cut", "--port", 0, cwd=tmp_path))
    assert "onnx did not start: cut/model.onnx.data is cut off: it has 100,000 bytes" in line
    shutil.copytree(graph, tmp_path / "other")
    maps = Path("/proc/self/maps").read_text().splitlines()
    libm = next(line.split()[-1] for line in maps if "libm" in line and ".so" in line)
    shutil.copyfile(libm, tmp_path / "other" / NAME)
    with pytest.raises(BesaError, match=rf"{NAME} is a library that this besa did not build: put"):
        OnnxBackend(tmp_path / "other", threads=1)
    with pytest.raises(BesaError, match=r"other cannot be loaded: .*RegisterCustomOps"):
        OnnxBackend(tmp_path / "other", threads=1, trust_remote_code=True)
    (tmp_path / "other" / NAME).unlink()
    with pytest.raises(BesaError, match=rf"{NAME} is missing: put .*{NAME} there"):
        OnnxBackend(tmp_path / "other", threads=1)
