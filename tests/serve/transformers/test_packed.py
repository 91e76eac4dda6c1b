"""Packed checkpoints in transformers: the same model as the dense one with zeros, in less memory.

The packed checkpoints are made here, by a function of this file's own, from models whose weights
are masked at random; what they are compared with is transformers' own loading of the dense twin.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

import besa
import besa.registration
import besa.serve.transformers.model
from besa import BesaConfig, BesaError
from besa.errors import BesaWarning
from besa.export.weights import pack_weight
from besa.formats import PackedConfig, pack, tensors_of
from besa.formats.config import FORMAT_VERSION
from besa.formats.module import SparseLinear
from besa.model.blocks import expert_count, find_blocks, find_linears
from tests.helpers import FAMILIES, PATIENCE, load_strictly, random_model, same_bytes, stored

ODD = ("bamba", "bloom", "codegen", "deepseek_v2", "gemma3", "gpt_bigcode", "qwen2_moe")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Pair:
    """One pruned model twice: dense with zeros, and packed."""

    dense: Path
    sparse: Path
    packed: list[str]  # the names of the packed weights

    def change(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Changes the tensors of the packed one."""
        tensors = stored(self.sparse)
        change(tensors)
        write(tensors, self.sparse)

    def config(self, **changes: Any) -> None:
        """Changes config.json of the packed one; None takes an entry out."""
        path = self.sparse / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write(tensors: dict[str, Tensor], directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    # safetensors reads a view as all of what it is a view of.
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def make_pair(
    directory: Path, family: str = "llama", values: str = "float32", **settings: Any
) -> Pair:
    """A random model of a family, each linear of its blocks pruned to a random half.

    Args:
        values: of the packed weights; the dense twin of whole numbers has them times their
            scales.
        settings: more of `PackedConfig`.
    """
    torch.manual_seed(1)
    model = random_model(family).to(TYPES.get(values, torch.float32))
    dense, sparse = directory / "dense", directory / "sparse"
    model.save_pretrained(dense)
    model.save_pretrained(sparse)
    config = PackedConfig(values, **settings)
    blocks_name, blocks = find_blocks(model)
    linears = {
        f"{blocks_name}.{index}.{linear.parameter}": linear
        for index, block in enumerate(blocks)
        for linear in find_linears(block, f"{blocks_name}.{index}", expert_count(model.config))
        if linear.groups == 1
    }
    weights = stored(dense)
    parts, packed = {}, []
    for name, weight in list(weights.items()):
        # A random weight is known by its values, whatever the files call it.
        same = [key for key in linears if same_bytes(model.get_parameter(key).data, weight)]
        if not same:
            parts[name] = weight
            continue
        transposed = linears[same[0]].transposed
        matrix = weight.T if transposed else weight
        pruned = torch.rand(matrix.shape) < torch.rand(len(matrix), 1)  # rows of any density
        matrix = matrix.masked_fill(pruned, 0)
        if values in ("int8", "int4"):
            whole = pack_weight(matrix, values, config.group_size)
            matrix = whole.unpack()
        else:
            whole = pack(matrix)
        weights[name] = matrix.T if transposed else matrix
        parts |= tensors_of(whole, name)
        packed.append(name)
    assert len(packed) == len(linears)
    write(weights, dense)
    write(parts, sparse)
    pair = Pair(dense, sparse, packed)
    pair.config(quantization_config=config.to_dict())
    return pair


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """`make_pair`, once for each of its arguments. Do not write into them."""
    made: dict[tuple[Any, ...], Pair] = {}

    def make(family: str = "llama", values: str = "float32", **settings: Any) -> Pair:
        key = (family, values, *sorted(settings.items()))
        if key not in made:
            made[key] = make_pair(tmp_path_factory.mktemp("pair"), family, values, **settings)
        return made[key]

    return make


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A Llama of one's own."""
    return make_pair(tmp_path)


def tokens() -> Tensor:
    return torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any, *, at: Any = None) -> Tensor:
    result: Tensor = model(tokens() if at is None else at).logits
    return result.float()


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}


# ------------------------------------------------------------------------ the same model

# Sums of float32 in another order.
EXACT = 2e-6


@pytest.mark.parametrize("family", [*FAMILIES, *ODD])
def test_every_family_is_what_its_dense_twin_is(pairs: Callable[..., Pair], family: str):
    pair = pairs(family)
    dense, sparse = load_strictly(pair.dense), load_strictly(pair.sparse)
    assert len(sparse_linears(sparse)) == len(pair.packed)
    assert distance(logits(sparse), logits(dense)) < EXACT
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert sparse.generate(tokens(), **asked).equal(dense.generate(tokens(), **asked))


def test_another_mask_is_another_model(pair: Pair):
    """What the test above would see: one column's bits of one row in the last block moved."""
    dense = load_strictly(pair.dense)
    name = pair.packed[-1]

    def move(tensors: dict[str, Tensor]) -> None:
        bits = tensors[name + "_bitmask"]
        row, byte = next((r, b) for r, b in bits.nonzero().tolist() if bits[r, b] not in (0, 255))
        bits[row, byte] = (int(bits[row, byte]) << 1 | int(bits[row, byte]) >> 7) & 255

    pair.change(move)
    assert distance(logits(load_strictly(pair.sparse)), logits(dense)) > 100 * EXACT


@pytest.mark.parametrize("values", ["bfloat16", "float16"])
def test_half_precision_is_as_close_to_the_truth_as_dense(pairs: Callable[..., Pair], values: str):
    pair = pairs("llama", values)
    truth = logits(load_strictly(pair.dense, dtype=torch.float32))
    dense, sparse = load_strictly(pair.dense), load_strictly(pair.sparse)
    assert sparse.dtype == dense.dtype == TYPES[values]
    assert distance(logits(sparse), truth) < 1.5 * distance(logits(dense), truth)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox"])
def test_values_keep_their_type(pairs: Callable[..., Pair], family: str):
    """`dtype` is of what is dense: the same weights, in a computation of another precision."""
    pair = pairs(family, "bfloat16")
    dense = load_strictly(pair.dense, dtype=torch.float32)
    sparse = load_strictly(pair.sparse, dtype=torch.float32)
    assert {parameter.dtype for parameter in sparse.parameters()} == {torch.float32}
    assert {m.weight_values.dtype for m in sparse_linears(sparse).values()} == {torch.bfloat16}
    assert distance(logits(sparse), logits(dense)) < EXACT


@pytest.mark.parametrize("group_size", [None, 32])
def test_int8(pairs: Callable[..., Pair], group_size: int | None):
    pair = pairs("llama", "int8", group_size=group_size, int8_input=False)
    dense, sparse = load_strictly(pair.dense), load_strictly(pair.sparse)
    assert {m.weight_values.dtype for m in sparse_linears(sparse).values()} == {torch.int8}
    assert distance(logits(sparse), logits(dense)) < EXACT
    half = load_strictly(pair.sparse, dtype=torch.bfloat16)
    assert {m.weight_scale.dtype for m in sparse_linears(half).values()} == {torch.float32}


@pytest.mark.parametrize("group_size", [None, 32])
def test_int4(pairs: Callable[..., Pair], group_size: int | None, tmp_path: Path):
    pair = pairs("llama", "int4", group_size=group_size, int8_input=False)
    dense, sparse = load_strictly(pair.dense), load_strictly(pair.sparse)
    assert {m.weight_values.dtype for m in sparse_linears(sparse).values()} == {torch.uint8}
    assert distance(logits(sparse), logits(dense)) < EXACT
    sparse.save_pretrained(tmp_path / "copy")
    again = stored(tmp_path / "copy")
    for name, tensor in stored(pair.sparse).items():
        assert same_bytes(again[name], tensor), name
    half = load_strictly(pair.sparse, dtype=torch.bfloat16)
    assert {m.weight_steps.dtype for m in sparse_linears(half).values()} == {torch.uint8}
    with_int8 = pairs("llama", "int4", group_size=group_size)
    assert EXACT < distance(logits(load_strictly(with_int8.sparse)), logits(dense)) < 0.05


def test_int8_activations(pairs: Callable[..., Pair]):
    pair = pairs("llama", "int8", int8_input=True)
    theirs = logits(load_strictly(pair.dense))
    assert EXACT < distance(logits(load_strictly(pair.sparse)), theirs) < 0.05


def test_casts_leave_values_alone(pairs: Callable[..., Pair]):
    model = load_strictly(pairs().sparse)
    before = {name: m.weight_values.clone() for name, m in sparse_linears(model).items()}
    exact = logits(model)
    nn.Module.to(model, torch.float16)
    assert model.dtype == torch.float16
    assert distance(logits(model), exact) < 0.01
    nn.Module.to(model, torch.float32)
    linears = sparse_linears(model)
    assert all(same_bytes(linears[name].weight_values, before[name]) for name in before)
    assert {m.dtype for m in linears.values()} == {torch.float32}


# ------------------------------------------------------------------------ ways to load it


def test_old_names(tmp_path: Path):
    """GPT-2's first files lack the prefix that the model has."""
    pair = make_pair(tmp_path, "gpt2")
    dense = load_strictly(pair.dense)

    def shorten(tensors: dict[str, Tensor]) -> None:
        short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        assert short.keys() != tensors.keys()
        tensors.clear()
        tensors.update(short)

    pair.change(shorten)
    assert distance(logits(load_strictly(pair.sparse)), logits(dense)) < EXACT


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(pairs: Callable[..., Pair], device_map: Any):
    pair = pairs()
    model = load_strictly(pair.sparse, device_map=device_map)
    assert distance(logits(model), logits(load_strictly(pair.dense))) < EXACT


def test_other_heads(pairs: Callable[..., Pair]):
    """The model without its head, and with one that is new."""
    pair = pairs("qwen2")
    base, theirs = AutoModel.from_pretrained(pair.sparse), AutoModel.from_pretrained(pair.dense)
    with torch.no_grad():
        ours, expected = (m(tokens()).last_hidden_state for m in (base, theirs))
    assert len(sparse_linears(base)) == len(pair.packed)
    assert distance(ours, expected) < EXACT
    classifier = AutoModelForSequenceClassification.from_pretrained(pair.sparse, pad_token_id=0)
    assert len(sparse_linears(classifier)) == len(pair.packed)


def test_what_is_ignored_stays_dense(pair: Pair):
    name = pair.packed[0]
    weight = stored(pair.dense)[name]

    def unpack(tensors: dict[str, Tensor]) -> None:
        for part in [part for part in tensors if part.startswith(name)]:
            del tensors[part]
        tensors[name] = weight

    pair.change(unpack)
    model = load_strictly(pair.sparse)
    assert len(sparse_linears(model)) == len(pair.packed) - 1
    assert distance(logits(model), logits(load_strictly(pair.dense))) < EXACT


def test_pruned_to_nothing(pair: Pair):
    """A linear without a single value, which is how zeros look when they are all there is."""
    name = pair.packed[0]
    parts = tensors_of(pack(torch.zeros_like(stored(pair.dense)[name])), name)
    pair.change(lambda tensors: tensors.update(parts))
    weights = stored(pair.dense)
    weights[name].zero_()
    write(weights, pair.dense)
    model = load_strictly(pair.sparse)
    assert distance(logits(model), logits(load_strictly(pair.dense))) < EXACT


# ------------------------------------------------------------------------ dense on request


def assert_dense(model: Any, pair: Pair, tmp_path: Path) -> None:
    """It is transformers' own: its linears, its files, trainable."""
    theirs = load_strictly(pair.dense)
    assert not sparse_linears(model)
    ours = {name: type(module) for name, module in model.named_modules()}
    assert ours == {name: type(module) for name, module in theirs.named_modules()}
    assert logits(model).equal(logits(theirs))
    model.save_pretrained(tmp_path / "saved")
    saved, expected = stored(tmp_path / "saved"), stored(pair.dense)
    assert saved.keys() == expected.keys()
    assert all(same_bytes(saved[name], expected[name]) for name in saved)
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_dense_on_request(pairs: Callable[..., Pair], family: str, tmp_path: Path):
    pair = pairs(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers tells that the flag is heeded
        model = load_strictly(pair.sparse, quantization_config=BesaConfig(dense=True))
    assert_dense(model, pair, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_afterwards(pairs: Callable[..., Pair], family: str, tmp_path: Path):
    pair = pairs(family)
    model = load_strictly(pair.sparse)
    model.save_pretrained(tmp_path / "packed")  # which leaves its marks on the model's config
    assert_dense(model.dequantize(), pair, tmp_path)


def test_dense_in_the_type_asked_for(pairs: Callable[..., Pair]):
    pair = pairs("llama", "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_strictly(
            pair.sparse, dtype=torch.float32, quantization_config=BesaConfig(dense=True)
        )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits(model).equal(logits(load_strictly(pair.dense, dtype=torch.float32)))


# ------------------------------------------------------------------------ saved, copied, compiled


@pytest.mark.parametrize(("family", "values"), [("llama", "bfloat16"), ("gpt2", "int8")])
def test_saved_and_loaded_again(pairs: Callable[..., Pair], family: str, values: str, tmp_path):
    pair = pairs(family, values)
    model = load_strictly(pair.sparse)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    saved, expected = stored(tmp_path / "saved"), stored(pair.sparse)
    assert saved.keys() == expected.keys()
    assert all(same_bytes(saved[name], expected[name]) for name in saved)
    configs = [
        json.loads((d / "config.json").read_text()) for d in (tmp_path / "saved", pair.sparse)
    ]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert logits(load_strictly(tmp_path / "saved")).equal(logits(model))


def test_copied(pairs: Callable[..., Pair]):
    model = load_strictly(pairs().sparse)
    assert logits(copy.deepcopy(model)).equal(logits(model))


def test_state_dict_goes_in_and_out(pairs: Callable[..., Pair]):
    model, other = load_strictly(pairs().sparse), load_strictly(pairs().sparse)
    for parameter in other.parameters():
        parameter.data.zero_()
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert logits(other).equal(logits(model))


def test_captured_as_one_graph(pairs: Callable[..., Pair]):
    model = load_strictly(pairs().sparse)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert logits(compiled).equal(logits(model))


@pytest.mark.slow
def test_compiled(pairs: Callable[..., Pair]):
    """By the compiler that makes code, which takes its time: one feed-forward part of the model."""
    model = load_strictly(pairs("llama", "bfloat16").sparse, dtype=torch.float32)
    part, x = model.model.layers[0].mlp, torch.randn(2, 12, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(part, fullgraph=True)(x), part(x))


def test_training_is_refused(pairs: Callable[..., Pair]):
    model = load_strictly(pairs().sparse)
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(BesaError, match=r"cannot be trained.*BesaConfig\(dense=True\)"):
        model.train()(tokens())
    model.eval()(tokens())


# ------------------------------------------------------------------------ damage

Tensors = dict[str, Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"


def no_values(tensors: Tensors) -> str:
    del tensors[DOWN + "_values"]
    return re.escape(f"{DOWN}_values is missing")


def no_bitmask(tensors: Tensors) -> str:
    del tensors[DOWN + "_bitmask"]
    return re.escape(f"{DOWN}_bitmask is missing")


def no_rows(tensors: Tensors) -> str:
    del tensors[DOWN + "_rows"]
    return re.escape(f"{DOWN}_rows is missing")


def nothing(tensors: Tensors) -> str:
    for part in ("_values", "_bitmask", "_rows"):
        del tensors[DOWN + part]
    return re.escape(f"lacks the weight {DOWN}")


def other_rows(tensors: Tensors) -> str:
    tensors[DOWN + "_rows"] = tensors[DOWN + "_rows"].flip(0)
    return re.escape(f"{DOWN}_rows does not count")


def a_value_less(tensors: Tensors) -> str:
    tensors[DOWN + "_values"] = tensors[DOWN + "_values"][:-1]
    return re.escape(DOWN) + r": values has \d+ elements, but bitmask \d+ bits set"


def a_bit_more(tensors: Tensors) -> str:
    bits = tensors[DOWN + "_bitmask"]
    row, byte = (bits != 255).nonzero()[0]
    bits[row, byte] |= bits[row, byte] + 1
    return re.escape(DOWN) + r": values has \d+ elements, but bitmask \d+ bits set"


def a_row_less(tensors: Tensors) -> str:
    bits, rows = tensors[DOWN + "_bitmask"], tensors[DOWN + "_rows"]
    last = sum(int(byte).bit_count() for byte in bits[-1])
    tensors[DOWN + "_bitmask"], tensors[DOWN + "_rows"] = bits[:-1], rows[:-1]
    tensors[DOWN + "_values"] = tensors[DOWN + "_values"][:-last]
    return re.escape(f"{DOWN} is [31, 48], but config.json makes it [32, 48]")


def other_type(tensors: Tensors) -> str:
    tensors[DOWN + "_bitmask"] = tensors[DOWN + "_bitmask"].to(torch.int8)
    return re.escape(f"{DOWN}: bitmask is torch.int8")


def no_norm(tensors: Tensors) -> str:
    del tensors["model.layers.1.input_layernorm.weight"]
    return r"lacks the weight model\.layers\.1\.input_layernorm\.weight"


def no_embedding(tensors: Tensors) -> str:
    del tensors["model.embed_tokens.weight"]
    return r"lacks the weight model\.embed_tokens\.weight"


DAMAGE = [
    no_values,
    no_bitmask,
    no_rows,
    nothing,
    other_rows,
    a_value_less,
    a_bit_more,
    a_row_less,
    other_type,
    no_norm,
    no_embedding,
]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.filterwarnings("ignore")
def test_damage_is_an_error_that_names_the_tensor(
    pair: Pair, damage: Callable[[Tensors], str], dense: bool
):
    messages: list[str] = []
    pair.change(lambda tensors: messages.append(damage(tensors)))
    with pytest.raises(BesaError, match=messages[0]) as caught:
        AutoModelForCausalLM.from_pretrained(
            pair.sparse, quantization_config=BesaConfig(dense=dense)
        )
    assert "\n" not in str(caught.value)


def test_a_scale_is_missing(tmp_path: Path):
    pair = make_pair(tmp_path, values="int8")
    pair.change(lambda tensors: tensors.pop(DOWN + "_scale"))
    with pytest.raises(BesaError, match=re.escape(f"{DOWN}: scale is missing")):
        AutoModelForCausalLM.from_pretrained(pair.sparse)


@pytest.mark.parametrize("bytes_left", [-100, 50, 0])
def test_a_file_is_cut_off(pair: Pair, bytes_left: int):
    path = pair.sparse / "model.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(BesaError, match=r"model\.safetensors is damaged or cut off"):
        AutoModelForCausalLM.from_pretrained(pair.sparse)


def test_a_version_of_the_future(pair: Pair):
    config = json.loads((pair.sparse / "config.json").read_text())["quantization_config"]
    pair.config(quantization_config={**config, "format_version": FORMAT_VERSION + 1})
    with pytest.raises(BesaError, match=r"version 4.*reads versions 1 to 3: upgrade besa"):
        AutoModelForCausalLM.from_pretrained(pair.sparse)


def test_a_model_that_is_not_packed(pairs: Callable[..., Pair]):
    with pytest.raises(BesaError, match="besa export"):
        AutoModelForCausalLM.from_pretrained(pairs().dense, quantization_config=BesaConfig())


def test_one_packed_expert_among_dense_ones(tmp_path: Path):
    pair = make_pair(tmp_path, "mixtral")
    [name] = [n for n in stored(pair.dense) if re.search(r"layers\.0.*experts\.0\.w2\.weight$", n)]

    def pack_it(tensors: Tensors) -> None:
        tensors |= tensors_of(pack(tensors.pop(name)), name)

    pair.change(pack_it)
    with pytest.raises(
        BesaError, match=r"layers\.0\.mlp\.experts\.gate_up_proj is not packed as a whole"
    ):
        AutoModelForCausalLM.from_pretrained(pair.sparse)


def test_parts_that_are_renamed_otherwise(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(DOWN)]:
            tensors[name.replace("down_proj", "lower")] = tensors.pop(name)

    pair.change(rename)
    rule = WeightRenaming(r"mlp\.lower\.weight$", "mlp.down_proj.weight")
    monkeypatch.setattr(
        besa.serve.transformers.model,
        "get_model_conversion_mapping",
        lambda model: [copy.deepcopy(rule)],
    )
    with pytest.raises(BesaError, match=r"mlp\.lower\.weight_\w+ cannot be loaded"):
        AutoModelForCausalLM.from_pretrained(pair.sparse)


def test_tensor_parallelism_is_refused():
    model = random_model("llama")
    model.config.distributed_config = {"tp_size": 2}
    with pytest.raises(BesaError, match="serve it with vLLM"):
        besa.serve.transformers.model.make_sparse(model, [], PackedConfig("float32"))


def test_offloading_to_disk_is_refused(pairs: Callable[..., Pair], tmp_path: Path):
    with pytest.raises(BesaError, match="device_map"):
        AutoModelForCausalLM.from_pretrained(
            pairs().sparse,
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=tmp_path / "offload",
        )


# ------------------------------------------------------------------------ the module


@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_and_its_weight(transposed: bool):
    weight = torch.randn(5, 11) * (torch.rand(5, 11) < 0.5)
    bias = nn.Parameter(torch.randn(5))
    linear = SparseLinear(pack(weight), bias, transposed=transposed)
    x = torch.randn(2, 3, 11)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, weight, bias))
    assert linear.weight.equal(weight.T if transposed else weight)
    assert linear.state_dict().keys() == {"bias", "weight_values", "weight_bitmask", "weight_rows"}
    assert "in_features=11, out_features=5" in repr(linear)
    restored = nn.Sequential(linear)
    besa.serve.transformers.model.make_dense(restored)
    assert type(restored[0]) is (Conv1D if transposed else nn.Linear)
    torch.testing.assert_close(restored(x.flatten(0, 1)), linear(x).flatten(0, 1))


# ------------------------------------------------------------------------ memory

# The first load is for what comes with any, such as modules; an answer reads all of a file's pages.
# Writing 5 to clear_refs starts the kernel's record of the most memory anew.
_PEAK = """
import re, sys
from pathlib import Path
import besa, torch
from transformers import AutoModelForCausalLM

def held(what):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(what + r":\\s+(\\d+)", status)[1])

def load(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    model(torch.ones(1, 4, dtype=torch.int64))
    return model

load(sys.argv[1])
before, own = held("VmRSS"), held("RssAnon")
Path("/proc/self/clear_refs").write_text("5")
model = load(sys.argv[2])
print(held("VmHWM") - before, held("RssAnon") - own)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_no_dense_copy_is_made(pairs: Callable[..., Pair], pair: Pair, tmp_path: Path):
    """A packed model takes its packed size, in pages of the file; nothing of it is copied.

    Three weights of 32 MB when dense, 4 MB when packed: one dense copy would show at once.
    """
    pair.config(intermediate_size=32768, hidden_size=256, head_dim=64, num_hidden_layers=1)
    torch.manual_seed(3)
    shapes = {
        **{f"mlp.{name}_proj": (32768, 256) for name in ("gate", "up")},
        "mlp.down_proj": (256, 32768),
        **{f"self_attn.{name}_proj": (256, 256) for name in ("q", "o")},
        **{f"self_attn.{name}_proj": (128, 256) for name in ("k", "v")},
    }
    weights = {
        f"model.layers.0.{name}.weight": pack(torch.randn(shape) * (torch.rand(shape) < 0.1))
        for name, shape in shapes.items()
    }
    size, dense = sum(weight.nbytes for weight in weights.values()), 4 * 32768 * 256
    tensors = {
        name: torch.ones([256 if n == 32 else n for n in value.shape])
        for name, value in stored(pair.dense).items()
        if "layers" not in name or re.search(r"layers\.0\..*norm", name)
    }
    for name, weight in weights.items():
        tensors |= tensors_of(weight, name)
    write(tensors, pair.sparse)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PEAK, pairs().sparse, pair.sparse],
        cwd=tmp_path,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    peak, kept = map(int, result.stdout.split())
    print(f"packed {size}, kept {kept}, peak {peak}, one dense weight {dense}")
    assert kept < 0.2 * size + 4e6 < size
    assert size < peak < 1.2 * size + 8e6 < size + dense / 2


# ------------------------------------------------------------------------ import besa

ORDERS = {
    "besa first": "import besa; import transformers.quantizers.auto as auto",
    "transformers first": "import transformers.quantizers.auto as auto; import besa",
    "its config first": "from besa import BesaConfig; import transformers.quantizers.auto as auto",
    "a model first": "from transformers import LlamaForCausalLM; import besa; "
    "import transformers.quantizers.auto as auto",
}


def python(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_registered_in_any_order(order: str, tmp_path: Path):
    result = python(
        f"{order}\n"
        "print(auto.AUTO_QUANTIZER_MAPPING['besa'].__name__)\n"
        "print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING['besa'].__name__)\n",
        tmp_path,
    )
    assert result.stdout.split() == ["BesaQuantizer", "BesaConfig"], result.stderr


def test_import_stays_light(tmp_path: Path):
    heavy = "{'torch', 'transformers', 'numpy', 'safetensors'}"
    result = python(f"import besa, sys; print(sorted({heavy} & sys.modules.keys()))", tmp_path)
    assert result.stdout == "[]\n", result.stderr


def test_an_unknown_transformers_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "besa.serve.transformers.quantizer", None)
    monkeypatch.delattr(besa.serve.transformers, "quantizer")
    with pytest.warns(BesaWarning, match="will not load besa's packed checkpoints"):
        besa.registration.register_with_transformers()


@pytest.mark.slow
def test_without_besa(pairs: Callable[..., Pair], tmp_path: Path):
    """What transformers does on its own, as the documentation says."""
    shutil.copytree(pairs().sparse, tmp_path / "sparse")
    result = python(
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained('sparse')",
        tmp_path,
    )
    assert "Unknown quantization type, got besa" in result.stdout + result.stderr
    assert "MISSING" in result.stdout + result.stderr
