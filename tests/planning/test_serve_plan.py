"""`besa serve --plan`: memory by part, as the engines will take it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from besa.planning import serve
from besa.planning.serve import plan_serve
from besa.serve.settings import ServeConfig
from besa.serve.vllm.cpu import cache_space
from tests.helpers import run

GIB = 1 << 30
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
PER_TOKEN = 2 * 4 * 8 * 128 * 2


class Memory:
    """A machine's memory."""

    def __init__(self, available: int) -> None:
        self.available = available


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config.json alone, on a machine with 16 GiB free and no GPU."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(serve, "memory", lambda: Memory(16 * GIB))
    monkeypatch.setattr(serve.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return tmp_path


def test_vllm_on_a_cpu_has_the_cache_that_besa_sets(model: Path):
    plan = plan_serve(ServeConfig(str(model), engine="vllm"))
    weights = plan.memory.parts["weights"]
    assert weights == pytest.approx(2 * (4 * 218.1e6 + 2 * 131.1e6), rel=0.01)
    cache = cache_space(16 * GIB, weights, 8192 * PER_TOKEN, ranks=1)
    assert plan.memory.parts["cache of keys and values"] == cache * GIB
    assert plan.per_token == PER_TOKEN
    assert plan.sequence == 8192 * PER_TOKEN
    assert plan.missing == {}


def test_what_the_user_sets_is_planned_with(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    asked = ServeConfig(str(model), engine="vllm", engine_args=("--max-model-len", "512"))
    plan = plan_serve(asked)
    assert plan.memory.parts["cache of keys and values"] == 3 * GIB
    assert (plan.context, plan.sequence) == (512, 512 * PER_TOKEN)


def test_a_model_that_is_too_large_says_what_to_do(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "memory", lambda: Memory(2 * GIB))
    plan = plan_serve(ServeConfig(str(model), engine="transformers"))
    assert plan.missing["memory"] > 0
    assert plan.advice[0].startswith("`besa prune` and `besa export`")


def test_a_packed_model_has_the_weights_of_its_files(packed: Path, tmp_path: Path):
    plan = plan_serve(ServeConfig(str(packed), engine="transformers"))
    files = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    assert plan.memory.parts["weights"] == files
    process = run("serve", packed, "--plan", "--engine", "transformers", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert "packed as float32" in process.output
    assert "It fits." in process.output


@pytest.fixture
def packed(tiny_model: Path, tmp_path: Path) -> Path:
    from besa.export import ExportConfig, export
    from tests.export.sparse import pruned_model

    source = pruned_model("llama", tmp_path / "pruned", tiny_model)
    return export(source, ExportConfig(out=tmp_path / "sparse")).out
