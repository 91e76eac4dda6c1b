"""Mixtures from pruning to generation: packed experts are the dense ones with zeros.

What they are compared with is transformers' own experts, in the pruned model as it was.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from besa import BesaConfig, BesaError
from besa.export import ExportConfig, export
from besa.formats.experts import SparseExperts
from besa.pruning.config import PruneConfig
from besa.pruning.pipeline import prune_blocks
from tests.export.sparse import assert_same_model, packed_names, put_zeros
from tests.helpers import (
    SENTENCES,
    byte_tokenizer,
    load_strictly,
    random_model,
    same_bytes,
    stored,
)
from tests.tiny import tiny_model

# Experts one by one under three kinds of names, in stacks of both layouts and under another name;
# shared experts and grouped routing (DeepSeek); biases and a clamped activation (GPT-OSS); inputs
# sorted by expert (Llama 4).
FAMILIES = (
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "llama4_text",
    "mixtral",
    "olmoe",
    "qwen3_moe",
)

# Sums of float32 in another order.
EXACT = 2e-6


def mixture(family: str) -> Any:
    """A tiny random one of a family."""
    return tiny_model(family) if family == "llama4_text" else random_model(family)


def tokens() -> Tensor:
    return torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def distance(ours: Any, theirs: Any) -> float:
    """The largest difference of logits, in units of the largest."""
    mine, other = (model(tokens()).logits.float() for model in (ours, theirs))
    return float((mine - other).abs().max() / other.abs().max())


def generated(model: Any) -> Tensor:
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found: Tensor = model.generate(tokens(), **asked)
    return found


def sparse_experts(model: nn.Module) -> list[SparseExperts]:
    return [module for module in model.modules() if isinstance(module, SparseExperts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pruning_to_generation_and_back(family: str, tmp_path: Path):
    dense = tmp_path / "dense"
    mixture(family).save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES)
    config = PruneConfig(
        out=tmp_path / "pruned",
        method="wanda",
        samples=2,
        seqlen=8,
        calibration=str(text),
        device="cpu",
    )
    pruned = prune_blocks(dense, config).out
    result = export(pruned, ExportConfig(out=tmp_path / "sparse"))

    before, packed = stored(pruned), packed_names(stored(result.out))
    experts = {key for key in before if "experts." in key or "_linear" in key}
    experts -= {key for key in experts if "shared" in key or key.endswith("_bias")}
    assert experts <= packed
    described = json.loads((result.out / "config.json").read_text())["quantization_config"]
    assert (described["format_version"], described["experts"]) == (3, True)
    assert {x.name for x in result.record.linears if x.expert} == {
        key.removesuffix(".weight") for key in experts
    }
    assert not result.record.dense

    theirs, ours = load_strictly(pruned), load_strictly(result.out)
    owners = {name.rpartition(".")[0] for name, p in theirs.named_parameters() if p.ndim == 3}
    assert len(sparse_experts(ours)) == len(owners) > 0
    assert distance(ours, theirs) < EXACT
    assert generated(ours).equal(generated(theirs))

    export(result.out, ExportConfig(out=tmp_path / "plain", format="dense"))
    assert_same_model(tmp_path / "plain", pruned)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A tiny mixture with zeros, dense and packed, made once. Do not write into them."""
    made: dict[Any, tuple[Path, Path]] = {}

    def make(family: str, **settings: Any) -> tuple[Path, Path]:
        key = (family, *settings.items())
        if key not in made:
            directory = tmp_path_factory.mktemp("mixture")
            put_zeros(mixture(family)).save_pretrained(directory / "pruned")
            config = ExportConfig(out=directory / "sparse", **settings)
            made[key] = directory / "pruned", export(directory / "pruned", config).out
        return made[key]

    return make


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_whole_numbers(
    exported: Callable[..., tuple[Path, Path]], family: str, quantize: str, tmp_path: Path
):
    """They are what they are unpacked to, but for the activations' eight bits."""
    _, sparse = exported(family, quantize=quantize, group_size=32)
    rounded = export(sparse, ExportConfig(out=tmp_path / "dense", format="dense")).out
    ours, theirs = load_strictly(sparse), load_strictly(rounded)
    assert {w.scale is not None for each in sparse_experts(ours) for w in each.packed} == {True}
    assert EXACT < distance(ours, theirs) < 0.05
    for each in ours.modules():
        if hasattr(each, "int8_input"):
            each.int8_input = False
    assert distance(ours, theirs) < EXACT
    ours.save_pretrained(tmp_path / "copy")
    assert_same_bytes(tmp_path / "copy", sparse)


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    mine, other = stored(ours), stored(theirs)
    assert mine.keys() == other.keys()
    assert not [name for name in mine if not same_bytes(mine[name], other[name])]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "granitemoe", "mixtral"])
def test_saved_and_made_dense(
    exported: Callable[..., tuple[Path, Path]], family: str, tmp_path: Path
):
    """Under the names that the files had, whatever the model calls them."""
    pruned, sparse = exported(family)
    model = load_strictly(sparse, dtype=torch.bfloat16)
    assert model(tokens()).logits.isfinite().all()
    assert {w.values.dtype for each in sparse_experts(model) for w in each.packed} == {
        torch.float32
    }
    load_strictly(sparse).save_pretrained(tmp_path / "copy")
    assert_same_bytes(tmp_path / "copy", sparse)
    for number, dense in enumerate(
        (
            load_strictly(sparse, quantization_config=BesaConfig(dense=True)),
            load_strictly(sparse).dequantize(),
        )
    ):
        theirs = load_strictly(pruned)
        assert not sparse_experts(dense)
        assert distance(dense, theirs) == 0
        dense.save_pretrained(tmp_path / str(number))
        assert_same_model(tmp_path / str(number), pruned)
        dense.train()(tokens(), labels=tokens()).loss.backward()
        grown = {name for name, p in dense.named_parameters() if p.grad is not None}
        theirs.train()(tokens(), labels=tokens()).loss.backward()
        assert grown == {name for name, p in theirs.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "olmoe"])
def test_captured_as_one_graph(exported: Callable[..., tuple[Path, Path]], family: str):
    """The experts are one operator to torch.compile, for any number of tokens."""
    (experts, *_) = sparse_experts(load_strictly(exported(family)[1]))
    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    for count in (3, 8):
        x = torch.randn(count, 32)
        routed = torch.randint(4, (count, 2)), torch.rand(count, 2)
        given = (x.repeat(4, 1),) if experts.sorted_input else (x, *routed)
        assert compiled(*given).equal(experts(*given))


def test_dense_experts_beside_packed_ones(tmp_path: Path):
    """A layer that was not pruned stays as it is, and is saved as it was."""
    model = mixture("mixtral")
    put_zeros(model, where=lambda name: "layers.0." in name).save_pretrained(tmp_path / "pruned")
    result = export(tmp_path / "pruned", ExportConfig(out=tmp_path / "sparse"))
    left = [linear for linear in result.record.dense if "experts" in linear.name]
    assert {linear.reason for linear in left} == {"too few zeros to gain by"}
    ours, theirs = load_strictly(result.out), load_strictly(tmp_path / "pruned")
    assert len(sparse_experts(ours)) == 1
    assert distance(ours, theirs) < EXACT
    ours.save_pretrained(tmp_path / "copy")
    assert_same_bytes(tmp_path / "copy", result.out)
    ours.dequantize().save_pretrained(tmp_path / "plain")
    assert_same_model(tmp_path / "plain", tmp_path / "pruned")


def test_training_is_refused(exported: Callable[..., tuple[Path, Path]]):
    (experts, *_) = sparse_experts(load_strictly(exported("olmoe")[1]))
    x = torch.randn(2, 32, requires_grad=True)
    with pytest.raises(BesaError, match="cannot be trained"):
        experts.train()(x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


def test_a_lost_expert(exported: Callable[..., tuple[Path, Path]], tmp_path: Path):
    sparse = shutil.copytree(exported("mixtral")[1], tmp_path / "sparse")
    tensors = stored(sparse)
    kept = {n: t for n, t in tensors.items() if not re.search(r"layers\.1\..*experts\.2\.w1", n)}
    assert len(kept) == len(tensors) - 3
    for path in sparse.glob("*.safetensors*"):
        path.unlink()
    save_file(kept, sparse / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BesaError, match=r"layers\.1\.\S+\.gate_up_proj is not packed as a whole"):
        AutoModelForCausalLM.from_pretrained(sparse)
    (sparse / "besa.json").unlink()
    with pytest.raises(BesaError, match=r"layers\.1\.\S+\.gate_up_proj lacks some of its experts"):
        export(sparse, ExportConfig(out=tmp_path / "dense", format="dense"))
    assert not (tmp_path / "dense").exists()
