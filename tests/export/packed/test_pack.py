"""`besa.export.export`: what is packed and how, what is refused, and what the record says."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from besa.errors import BesaError
from besa.export import ExportConfig, export
from besa.formats.config import FORMAT_VERSION
from besa.typed_json import to_json
from tests.export.sparse import (
    assert_same_model,
    in_a_block,
    packed_names,
    pruned_model,
    put_zeros,
    quantization,
    unpacked_bits,
)
from tests.helpers import random_model, save_with_tokenizer, stored

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def pruned(tiny_model: Path, tmp_path: Path) -> Path:
    return pruned_model("llama", tmp_path / "pruned", tiny_model)


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edits a checkpoint's one file, or the file that holds block 0's q_proj."""
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if any(key.startswith(Q_PROJ) for key in tensors):
            edit(tensors)
            save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------- what is packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_are_kept(dtype: torch.dtype, tiny_model: Path, tmp_path: Path):
    model = put_zeros(random_model("qwen2")).to(dtype)
    pruned = save_with_tokenizer(model, tmp_path / "pruned", tiny_model)
    sparse = export(pruned, ExportConfig(out=tmp_path / "sparse")).out
    assert quantization(sparse)["values"] == str(dtype).removeprefix("torch.")
    assert stored(sparse)[f"{Q_PROJ}.weight_values"].dtype == dtype
    export(sparse, ExportConfig(out=tmp_path / "dense", format="dense"))
    assert_same_model(tmp_path / "dense", pruned)


def test_shards_in_another_layout(tiny_model: Path, tmp_path: Path):
    model = put_zeros(random_model("mixtral", num_hidden_layers=3))
    pruned = save_with_tokenizer(model, tmp_path / "pruned", tiny_model, max_shard_size="50KB")
    assert len(list(pruned.glob("*.safetensors"))) > 5
    sparse = export(pruned, ExportConfig(out=tmp_path / "sparse")).out
    index = json.loads((sparse / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == stored(sparse).keys()
    for weight in packed_names(stored(sparse)):
        files = {index[f"{weight}_{part}"] for part in ("values", "bitmask", "rows")}
        assert len(files) == 1
    export(sparse, ExportConfig(out=tmp_path / "dense", format="dense"))
    assert_same_model(tmp_path / "dense", pruned)


def test_tied_embeddings(tiny_model: Path, tmp_path: Path):
    pruned = pruned_model("llama", tmp_path / "pruned", tiny_model, tie_word_embeddings=True)
    assert "lm_head.weight" not in stored(pruned)
    result = export(pruned, ExportConfig(out=tmp_path / "sparse"))
    assert "lm_head.weight" not in stored(result.out)
    assert quantization(result.out)["ignore"] == ["lm_head"]
    weights = {
        name: t for name, t in stored(pruned).items() if t.ndim == 2
    }  # the head's twice in one
    norms = sum(t.nbytes for name, t in stored(pruned).items() if t.ndim == 1 and in_a_block(name))
    read = result.record.read_per_token
    assert read.dense_bytes == sum(t.nbytes for t in weights.values()) + norms


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_inputs_that_eight_does_not_divide(quantize: str | None, tiny_model: Path, tmp_path: Path):
    pruned = pruned_model("llama", tmp_path / "pruned", tiny_model, intermediate_size=45)
    sparse = export(pruned, ExportConfig(out=tmp_path / "sparse", quantize=quantize)).out
    tensors = stored(sparse)
    assert tensors["model.layers.0.mlp.down_proj.weight_bitmask"].shape == (32, 6)
    unpacked_bits(tensors, "model.layers.0.mlp.down_proj.weight", 45)
    export(sparse, ExportConfig(out=tmp_path / "dense", format="dense"))
    if quantize is None:
        assert_same_model(tmp_path / "dense", pruned)
    else:
        dense = stored(tmp_path / "dense")["model.layers.0.mlp.down_proj.weight"]
        assert dense.shape == (32, 45)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("group_size", [None, 32, 64])
def test_int8(family: str, group_size: int | None, tiny_model: Path, tmp_path: Path):
    model = put_zeros(random_model(family)).to(torch.bfloat16)
    pruned = save_with_tokenizer(model, tmp_path / "pruned", tiny_model)
    config = ExportConfig(out=tmp_path / "sparse", quantize="int8", group_size=group_size)
    sparse = export(pruned, config).out
    described = quantization(sparse)
    assert (described["values"], described["group_size"]) == ("int8", group_size)
    export(sparse, ExportConfig(out=tmp_path / "dense", format="dense"))
    before, packed, after = stored(pruned), stored(sparse), stored(tmp_path / "dense")
    assert len(packed_names(packed)) == (14 if family == "llama" else 8)
    for weight in packed_names(packed):
        source = before[weight].float().numpy()
        source = source.T if family == "gpt2" else source
        rows, cols = source.shape
        width = group_size or cols
        rounded = unpacked_bits(packed, weight, cols).view(np.int8)
        for start in range(0, cols, width):
            group = slice(start, min(start + width, cols))
            scale = packed[f"{weight}_scale"].numpy()[:, start // width][:, None]
            peak = np.abs(source[:, group]).max(1, keepdims=True)
            assert np.allclose(scale, np.where(peak > 0, peak / 127, 1), rtol=1e-6)
            assert np.array_equal(rounded[:, group], np.rint(source[:, group] / scale))
            product = torch.from_numpy(rounded[:, group] * scale).to(torch.bfloat16)
            found = after[weight].T if family == "gpt2" else after[weight]
            assert torch.equal(found[:, group], product)
        assert rows == len(rounded)
    for key in before.keys() - packed_names(packed):
        assert torch.equal(after[key], before[key])
    # What rounds to 0 is a zero from then on.
    nonzeros = packed[f"{Q_PROJ}.weight_values"] if family == "llama" else None
    assert nonzeros is None or nonzeros.all()


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_patterns_are_found(
    pattern: tuple[int, int], family: str, tiny_model: Path, tmp_path: Path
):
    model = put_zeros(random_model(family), pattern=pattern)
    pruned = save_with_tokenizer(model, tmp_path / "pruned", tiny_model)
    result = export(pruned, ExportConfig(out=tmp_path / "sparse"))
    expected = "4:8" if pattern == (4, 8) else "2:4"  # 1:4 keeps to 2:4
    assert result.record.pattern == expected
    assert quantization(result.out)["pattern"] == expected

    kept = {4: 0, 8: 0}  # the most of so many neighbours
    for path in pruned.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if in_a_block(name) and tensor.ndim == 2:
                matrix = tensor.T if family == "gpt2" else tensor
                if "0.self_attn.q_proj" in name or "1.mlp.c_fc" in name:
                    matrix[5, 8:11] = 1.0  # one too many, in one place
                for m in kept:
                    kept[m] = max(kept[m], int((matrix != 0).unflatten(1, (-1, m)).sum(2).max()))
        save_file(tensors, path, metadata={"format": "pt"})
    assert kept[4] >= 3
    spoilt = export(pruned, ExportConfig(out=tmp_path / "spoilt"))
    assert spoilt.record.pattern == ("4:8" if kept[8] <= 4 else "unstructured")


def test_unstructured_zeros_are_no_pattern(pruned: Path, tmp_path: Path):
    assert export(pruned, ExportConfig(out=tmp_path / "s")).record.pattern == "unstructured"


def test_a_linear_too_dense_to_gain_stays_dense(tiny_model: Path, tmp_path: Path):
    model = put_zeros(
        random_model("llama"), where=lambda name: in_a_block(name) and "up" not in name
    )
    put_zeros(model, rate=0.05, where=lambda name: "layers.1.mlp.up_proj" in name)
    pruned = save_with_tokenizer(model, tmp_path / "pruned", tiny_model)
    result = export(pruned, ExportConfig(out=tmp_path / "sparse"))
    left = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert [linear.name for linear in result.record.dense] == left
    none, few = (linear.density for linear in result.record.dense)
    assert none == 1
    assert few == float((stored(pruned)[f"{left[1]}.weight"] != 0).double().mean())
    assert set(quantization(result.out)["ignore"]) == {*left, "lm_head"}
    assert {f"{name}.weight" for name in left} <= stored(result.out).keys()
    card = (result.out / "README.md").read_text()
    assert "2 × up\\_proj" in card
    assert f"too few zeros to gain by, 0.0% to {1 - few:.1%}" in card
    export(result.out, ExportConfig(out=tmp_path / "dense", format="dense"))
    assert_same_model(tmp_path / "dense", pruned)


def test_a_weight_of_another_type_than_the_rest_stays_dense(pruned: Path, tmp_path: Path):
    name = f"{Q_PROJ}.weight"
    change(pruned, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    result = export(pruned, ExportConfig(out=tmp_path / "sparse"))
    assert [linear.name for linear in result.record.dense] == [Q_PROJ]
    assert "stored as bfloat16" in result.record.dense[0].reason


# ------------------------------------------------------------------------------- its sizes


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linears are wide enough for a row's own bytes not to count."""
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8}
    model = put_zeros(random_model("llama", **sizes)).to(torch.bfloat16)
    return save_with_tokenizer(model, tmp_path_factory.mktemp("wide") / "pruned", tiny_model)


@pytest.mark.parametrize(("quantize", "most"), [(None, 0.57), ("int8", 0.33), ("int4", 0.21)])
def test_sizes(wide: Path, quantize: str | None, most: float, tmp_path: Path):
    result = export(wide, ExportConfig(out=tmp_path / "sparse", quantize=quantize))
    before, after = stored(wide), stored(result.out)
    packed = packed_names(after)
    dense = sum(before[name].nbytes for name in packed)
    parts = sum(t.nbytes for key, t in after.items() if key.startswith(tuple(packed)))
    assert len(packed) == 14
    assert parts / dense < most
    sizes, read = result.record.sizes, result.record.read_per_token
    assert (sizes.linears_dense_bytes, sizes.linears_bytes) == (dense, parts)
    files = sum(path.stat().st_size for path in result.out.glob("*.safetensors"))
    assert sizes.bytes == files
    assert sizes.dense_bytes == sum(p.stat().st_size for p in wide.glob("*.safetensors"))
    # Of all tensors a token reads all but the embedding and the last norm.
    unread = ("model.embed_tokens.weight", "model.norm.weight")
    total = sum(tensor.nbytes for key, tensor in before.items() if key not in unread)
    assert read.dense_bytes == total
    assert read.packed_bytes == total - dense + parts
    assert read.speedup == pytest.approx(total / (total - dense + parts))


def test_a_token_reads_its_own_experts_only(tiny_model: Path, tmp_path: Path):
    reads = {}
    for chosen in (1, 4):
        pruned = pruned_model(
            "mixtral", tmp_path / f"{chosen}", tiny_model, num_experts_per_tok=chosen
        )
        result = export(pruned, ExportConfig(out=tmp_path / f"sparse-{chosen}"))
        reads[chosen] = result.record.read_per_token
    experts = sum(t.nbytes for name, t in stored(pruned).items() if "experts" in name)
    packed = sum(t.nbytes for name, t in stored(result.out).items() if "experts" in name)
    assert experts > packed > 0
    assert reads[4].dense_bytes - reads[1].dense_bytes == round(experts * 3 / 4)
    assert reads[4].packed_bytes - reads[1].packed_bytes == round(packed * 3 / 4)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tiny_model: Path, tmp_path: Path):
    from tests.helpers import run

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    peaks: dict[str, list[int]] = {"sparse": [], "dense": []}
    for blocks in (4, 16):
        model = put_zeros(random_model("llama", **sizes, num_hidden_layers=blocks))
        pruned = save_with_tokenizer(model, tmp_path / f"pruned-{blocks}", tiny_model)
        block = sum(p.nbytes for p in model.model.layers[0].parameters())
        del model
        sparse, dense = tmp_path / f"sparse-{blocks}", tmp_path / f"dense-{blocks}"
        for command in (("export", pruned), ("export", "--format", "dense", sparse)):
            out = dense if "dense" in command else sparse
            process = run(*command, "--out", out, cwd=tmp_path)
            assert process.returncode == 0, process.errors
            record = json.loads((out / "besa.json").read_text())
            peaks["dense" if out == dense else "sparse"].append(record["peak_memory_bytes"])
    for few, many in peaks.values():
        assert many - few < 1.5 * block  # and not 12 of them


# ------------------------------------------------------------------------ record and card


def test_the_record(pruned: Path, tmp_path: Path):
    (pruned / "besa.json").write_text(json.dumps({"mine": 1}))
    result = export(pruned, ExportConfig(out=tmp_path / "sparse", quantize="int8", group_size=32))
    record = json.loads((result.out / "besa.json").read_text())
    assert record == to_json(result.record)
    files = {path.name: path for path in result.out.glob("*.safetensors")}
    assert record["digests"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    }
    assert record["source"] == {"mine": 1}
    assert record["settings"]["group_size"] == 32
    assert record["versions"]["torch"] == torch.__version__
    tensors = stored(result.out)
    for linear in record["linears"]:
        values = tensors[f"{linear['name']}.weight_values"]
        rows, cols = linear["shape"]
        assert linear["nonzeros"] == len(values)
        assert linear["density"] == len(values) / (rows * cols)
        parts = [t for key, t in tensors.items() if key.startswith(f"{linear['name']}.weight_")]
        assert linear["bytes"] == sum(part.nbytes for part in parts)
    kinds = [linear["kind"] for linear in record["linears"]]
    assert kinds[:7] == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]


def test_the_card(tiny_model: Path, tmp_path: Path):
    pruned = pruned_model("llama", tmp_path / "name`of|it", tiny_model)
    sparse = export(pruned, ExportConfig(out=tmp_path / "sparse")).out
    card = (sparse / "README.md").read_text()
    front, rest = card.removeprefix("---\n").split("\n---\n", 1)
    assert 'base_model: "name`of|it"' in front
    assert str(tmp_path) not in card
    assert "name\\`of\\|it" in rest
    for words in ("pip install besa[vllm]", "vllm serve SPARSE", "besa serve", "import besa"):
        assert words in rest
    assert "14 linears" in rest


def test_the_card_tells_how_besa_pruned_it(pruned: Path, tmp_path: Path):
    source = {
        "model": "maker/Model-1B",
        "settings": {"method": "sparsegpt"},
        "sparsity": {"target": 0.5, "achieved": 0.4871},
    }
    (pruned / "besa.json").write_text(json.dumps(source))
    sparse = export(pruned, ExportConfig(out=tmp_path / "sparse")).out
    dense = export(sparse, ExportConfig(out=tmp_path / "dense", format="dense")).out
    again = export(dense, ExportConfig(out=tmp_path / "again")).out
    for out in (sparse, again):
        card = (out / "README.md").read_text()
        assert 'base_model: "maker/Model-1B"' in card
        assert "48.7% sparse" in card
        assert "pruned to 50% with SparseGPT" in card


# ----------------------------------------------------------------------------- refusals


def refused(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(BesaError) as caught:
        export(source, ExportConfig(out=out, **options))
    assert not out.exists()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_model_that_is_not_pruned(quantize: str | None, tiny_model: Path, tmp_path: Path):
    line = refused(tiny_model, tmp_path / "out", quantize=quantize)
    assert "is not pruned" in line
    assert "run `besa prune` first" in line
    assert not list(tmp_path.iterdir())


def test_what_is_packed_or_quantized_already(pruned: Path, tmp_path: Path):
    sparse = export(pruned, ExportConfig(out=tmp_path / "sparse")).out
    assert "is packed already" in refused(sparse, tmp_path / "out")
    config = json.loads((pruned / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (pruned / "config.json").write_text(json.dumps(config))
    assert "is quantized (gptq)" in refused(pruned, tmp_path / "out")
    assert "gptq" in refused(pruned, tmp_path / "out", format="dense")


def test_a_plain_checkpoint_is_not_unpacked(pruned: Path, tmp_path: Path):
    assert "is not packed" in refused(pruned, tmp_path / "out", format="dense")


def test_weights_that_are_not_right(pruned: Path, tmp_path: Path):
    name = f"{Q_PROJ}.weight"
    original = load_file(pruned / "model.safetensors")[name]
    change(pruned, lambda t: t[name][0, :2].fill_(float("nan")))
    assert f"{name} has 2 values that are NaN" in refused(pruned, tmp_path / "out")
    change(pruned, lambda t: t.update({name: original[:, 1:].contiguous()}))
    assert f"{name} has another shape" in refused(pruned, tmp_path / "out")
    change(pruned, lambda t: t.pop(name))
    change(pruned, lambda t: t.update({f"{Q_PROJ}.other": original}))
    assert f"lacks the weight {name}" in refused(pruned, tmp_path / "out")


def test_a_format_of_the_future(pruned: Path, tmp_path: Path):
    sparse = export(pruned, ExportConfig(out=tmp_path / "sparse")).out
    config = json.loads((sparse / "config.json").read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    (sparse / "config.json").write_text(json.dumps(config))
    line = refused(sparse, tmp_path / "out", format="dense")
    assert f"version {FORMAT_VERSION + 1}" in line
    assert "upgrade besa" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "gguf"}, "format 'gguf'"),
        ({"quantize": "int3"}, "quantize 'int3'"),
        ({"quantize": "int8", "group_size": 48}, "group_size 48"),
        ({"group_size": 64}, "--group-size is for"),
        ({"format": "dense", "quantize": "int8"}, "--quantize is for packing"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], words: str):
    with pytest.raises(BesaError, match=re.escape(words)):
        ExportConfig(out="out", **options)


# ------------------------------------------------------------------------------- damage


@pytest.fixture
def sparse(pruned: Path, tmp_path: Path) -> Path:
    return export(pruned, ExportConfig(out=tmp_path / "sparse")).out


def test_a_bit_that_fell_over(sparse: Path, tmp_path: Path):
    path = sparse / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "model-00002-of-00003.safetensors is damaged" in refused(
        sparse, tmp_path / "out", format="dense"
    )


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a value too few": (
        lambda t: t.update({f"{Q_PROJ}.weight_values": t[f"{Q_PROJ}.weight_values"][1:].clone()}),
        "values has",
    ),
    "a bit more": (lambda t: t[f"{Q_PROJ}.weight_bitmask"].fill_(255), "bits set"),
    "no values": (lambda t: t.pop(f"{Q_PROJ}.weight_values"), "weight_values is missing"),
    "no bitmask": (lambda t: t.pop(f"{Q_PROJ}.weight_bitmask"), "weight_bitmask is missing"),
    "other rows": (
        lambda t: t.update(
            {
                f"{Q_PROJ}.weight_{part}": t[
                    f"{Q_PROJ.replace('q_proj', 'k_proj')}.weight_{part}"
                ].clone()
                for part in ("values", "bitmask")
            }
        ),
        "but config.json says",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_parts_that_do_not_fit(name: str, sparse: Path, tmp_path: Path):
    """Without digests to tell, too."""
    edit, words = DAMAGES[name]
    (sparse / "besa.json").unlink()
    (sparse / "model.safetensors.index.json").unlink()
    tensors = stored(sparse)
    for path in sparse.glob("*.safetensors"):
        path.unlink()
    edit(tensors)
    save_file(tensors, sparse / "model.safetensors", metadata={"format": "pt"})
    line = refused(sparse, tmp_path / "out", format="dense")
    assert Q_PROJ in line
    assert words in line


def test_a_file_that_is_cut_off(sparse: Path, tmp_path: Path):
    path = sparse / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    line = refused(sparse, tmp_path / "out", format="dense")
    assert "model-00003-of-00003.safetensors" in line
    assert "cut off" in line


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_what_the_disk_got_wrong_is_noticed(
    quantize: str | None, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = safetensors.torch.save_file

    def wrong(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        changed = {
            key: tensor.flip(0) if key == f"{Q_PROJ}.weight_values" else tensor
            for key, tensor in tensors.items()
        }
        write(changed, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", wrong)
    line = refused(pruned, tmp_path / "out", quantize=quantize)
    assert f"does not hold what was written ({Q_PROJ})" in line
    monkeypatch.undo()
    export(pruned, ExportConfig(out=tmp_path / "out", quantize=quantize))  # and done again
