"""What `besa serve` starts, without starting it: flags, environment, cores and cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import besa.serve.cpu
import besa.serve.transformers.engine
import besa.serve.vllm.cpu
import besa.serve.vllm.engine
from besa.errors import BesaError
from besa.machine import Memory
from besa.serve.command import command_for
from besa.serve.cpu import longest_sequence
from besa.serve.engines import ENGINES, engine_named, engines
from besa.serve.settings import KEY_VARIABLES, ServeConfig, flag_value, key_from_environment
from besa.serve.vllm.engine import ranks_here

TELEMETRY = (
    *("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"),
    *("HF_HUB_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY"),
)
OURS = (*TELEMETRY, "VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model's directory, on a machine with four cores, no GPU and vLLM's build for CPUs."""
    for name in (*OURS, "OMP_NUM_THREADS", "BESA_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(besa.serve.vllm.engine, "vllm_version", lambda: "0.32.0+cpu")
    monkeypatch.setattr(besa.serve.transformers.engine, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(besa.serve.vllm.cpu, "physical_cores", lambda: [[0, 1, 2, 3]])
    monkeypatch.setattr(besa.serve.cpu, "core_share", lambda: None)
    monkeypatch.setattr(besa.serve.vllm.cpu, "memory", lambda: Memory(64 << 30, 64 << 30, None, 0))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


# A token of a sequence takes 2 × 32 layers × 8 heads × 128 values of 2 bytes: 128 KiB.
LLAMA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


def started(
    directory: Path, *engine_args: str, **settings: Any
) -> tuple[list[str], dict[str, str]]:
    config = ServeConfig(str(directory), engine_args=engine_args, **settings)
    command = command_for(config, directory)
    return list(command.arguments), dict(command.environment)


# ------------------------------------------------------------------------- vLLM


def test_vllm_on_a_cpu(here: Path):
    arguments, environment = started(here, "--max-num-seqs", "4")
    assert arguments[:7] == [
        *(sys.executable, "-P", "-m", "besa.serve.engine", "vllm", "serve", str(here))
    ]
    assert arguments[7:] == [
        *("--host", "127.0.0.1", "--port", "8000", "--served-model-name", here.name),
        *("--shutdown-timeout", "30", "--uvicorn-log-level", "warning"),
        *("--max-model-len", "auto", "--max-num-seqs", "4"),
    ]
    assert environment == {
        **dict.fromkeys(TELEMETRY, "1"),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "0-3",
        "VLLM_CPU_KVCACHE_SPACE": "30",  # half of 64 - 3 GiB; 64 sequences would use 64
    }


def test_vllm_on_gpus(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(besa.serve.vllm.engine, "vllm_version", lambda: "0.32.0")
    arguments, environment = started(here)
    assert "--max-model-len" not in arguments
    assert environment.keys() == {*TELEMETRY, "VLLM_LOGGING_LEVEL"}


def test_what_the_user_says_stays(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "2")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    arguments, environment = started(here, "--max-model-len=512")
    assert "auto" not in arguments
    assert environment["VLLM_NO_USAGE_STATS"] == "0"
    assert environment["DO_NOT_TRACK"] == "1"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "2"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"


@pytest.mark.parametrize("flag", ["--kv-cache-memory-bytes", "--gpu_memory_utilization"])
def test_one_size_of_the_cache(here: Path, flag: str):
    assert "VLLM_CPU_KVCACHE_SPACE" not in started(here, flag, "0.5")[1]


def test_several_ranks_share_the_cores(here: Path):
    arguments, environment = started(
        here, "--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"
    )
    assert arguments[-4:] == ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"]
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0|1|2|3"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"


@pytest.mark.parametrize(
    "elsewhere",
    [
        ("--distributed-executor-backend", "ray"),
        ("--nnodes", "2", "--node-rank", "0"),
        ("--data-parallel-size-local=1",),
    ],
)
def test_other_machines_are_not_besas(here: Path, elsewhere: tuple[str, ...]):
    arguments, environment = started(here, "-tp", "2", *elsewhere)
    assert arguments[-len(elsewhere) :] == list(elsewhere)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        ((), 1),
        (("--tensor-parallel-size", "4"), 4),
        (("-tp=2", "-pp", "3"), 6),
        (("--tensor_parallel_size", "2", "--data-parallel-size", "2"), 4),
        (("--distributed-executor-backend", "mp", "-tp", "2"), 2),
        (("--distributed-executor-backend=ray", "-tp", "2"), None),
        (("--tensor-parallel-size", "many"), 1),  # vLLM says what it thinks of that
    ],
)
def test_ranks(arguments: tuple[str, ...], ranks: int | None):
    assert ranks_here(arguments) == ranks


@pytest.mark.parametrize("flag", ["--headless", "--uds=/tmp/x"])
def test_flags_without_a_server_to_wait_for(here: Path, flag: str):
    with pytest.raises(BesaError, match=f"^{flag} is not for `besa serve`"):
        started(here, flag)


# ------------------------------------------------------------------------- transformers


def test_transformers(here: Path, monkeypatch: pytest.MonkeyPatch):
    arguments, environment = started(here, "--dtype", "float32", engine="transformers")
    assert arguments[4:6] == ["transformers", "serve"]
    assert arguments[-5:] == [
        *("--continuous-batching", "--log-level", "error", "--dtype", "float32")
    ]
    assert environment == dict.fromkeys(TELEMETRY, "1")
    monkeypatch.setattr(besa.serve.transformers.engine, "has_nvidia_gpu", lambda: True)
    assert "--continuous-batching" not in started(here, engine="transformers")[0]


def test_transformers_where_there_is_no_vllm(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(besa.serve.vllm.engine, "vllm_version", lambda: None)
    assert started(here)[0][4] == "transformers"


def test_transformers_cannot_serve(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(BesaError, match=r"without uvicorn: pip install 'besa\[serve\]'"):
        started(here, engine="transformers")


# ------------------------------------------------------------------------- all engines


def test_the_table_of_engines():
    assert [engine.name for engine in engines()] == list(ENGINES)
    assert {engine.key_variable for engine in engines()} <= set(KEY_VARIABLES)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_imports_nothing_heavy(name: str):
    """`besa serve --dry-run` and each of vLLM's processes import it."""
    heavy = {"torch", "transformers", "vllm", "onnxruntime", "onnxruntime_genai", "fastapi"}
    code = (
        "import sys; import besa.serve.engine; from besa.serve.engines import engine_named\n"
        f"engine_named({name!r}); print(*(sys.modules.keys() & {heavy!r}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "\n"


def test_onnx(here: Path):
    (here / "genai_config.json").write_text("{}")
    engine = engine_named("onnx")
    if engine.version() is None:
        pytest.skip("ONNX Runtime GenAI is not installed")
    arguments, environment = started(here)
    assert arguments[4:6] == ["onnx", "serve"]
    assert arguments[-2:] == ["--log-level", "error"]
    assert environment == dict.fromkeys(TELEMETRY, "1")
    with pytest.raises(BesaError, match="is an ONNX model: serve it with --engine onnx"):
        started(here, engine="vllm")


def test_a_checkpoint_is_not_for_onnx(here: Path):
    with pytest.raises(BesaError, match="is no ONNX model: `besa export --format onnx` makes one"):
        started(here, engine="onnx")


# ------------------------------------------------------------------------- cores and sequences


def test_the_cores_of_this_machine():
    nodes = besa.serve.cpu.physical_cores()
    cores = [core for node in nodes for core in node]
    assert len(cores) == len(set(cores)) >= 1
    assert set(cores) <= os.sched_getaffinity(0)


def test_a_sequence_of_a_model():
    assert longest_sequence(LLAMA) == 8192 * 128 * 1024
    assert longest_sequence({**LLAMA, "dtype": "float32"}) == 2 * 8192 * 128 * 1024
    assert longest_sequence({**LLAMA, "head_dim": 64}) == 8192 * 64 * 1024
    assert longest_sequence({"text_config": LLAMA}) == 8192 * 128 * 1024
    assert longest_sequence({"n_embd": 768}) is None


# ------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "llama.cpp"}, "--engine llama.cpp is none of vllm, transformers"),
        ({"port": 65536}, "--port 65536 is not from 0 to 65535"),
        ({"host": ""}, "--host is empty"),
        ({"shutdown_timeout": -1}, "--shutdown-timeout -1 is negative"),
        ({"served_model_name": " "}, "--served-model-name is empty"),
        ({"api_key": ""}, "the API key is empty"),
        ({"api_key": "schlüssel"}, "no header can carry"),
        ({"api_key": "two\nlines"}, "no header can carry"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str):
    with pytest.raises(BesaError, match=words):
        ServeConfig("sparse", **settings)


def test_a_key_is_not_shown():
    assert "secret" not in repr(ServeConfig("sparse", api_key="secret"))


@pytest.mark.parametrize(
    ("host", "url", "local"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000", True),
        ("localhost", "http://localhost:8000", True),
        ("::1", "http://[::1]:8000", True),
        ("0.0.0.0", "http://127.0.0.1:8000", False),
        ("::", "http://[::1]:8000", False),
        ("10.0.0.7", "http://10.0.0.7:8000", False),
        ("box.example", "http://box.example:8000", False),
    ],
)
def test_where_it_is(host: str, url: str, local: bool):
    config = ServeConfig("sparse", host=host)
    assert (config.url, config.is_local) == (url, local)


def test_with_a_certificate():
    config = ServeConfig("sparse", engine_args=("--ssl_certfile", "x.pem"))
    assert config.url == "https://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("model", "name"),
    [("models/sparse/", "sparse"), ("org/model", "model"), (".", Path.cwd().name), ("/", "/")],
)
def test_what_clients_call_it(model: str, name: str):
    assert ServeConfig(model).name == name
    assert ServeConfig(model, served_model_name="mine").name == "mine"


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ((), None),
        (("--other", "1"), None),
        (("--flag", "1"), "1"),
        (("--flag=1",), "1"),
        (("--fl_ag", "1"), None),
        (("--flag", "1", "--flag", "2"), "2"),
        (("-f", "3"), "3"),
        (("--flag",), ""),
        (("--flag=",), ""),
        (("flag", "1"), None),
    ],
)
def test_flags(arguments: tuple[str, ...], value: str | None):
    assert flag_value(arguments, "--flag", "-f") == value


def test_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BESA_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert key_from_environment() is None
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert key_from_environment() == "theirs"
    monkeypatch.setenv("BESA_API_KEY", "ours")
    assert key_from_environment() == "ours"
