"""`besa export --format onnx`: graphs that are the model, dense and packed, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from besa.bench.checkpoint import packing
from besa.bench.results import Packing
from besa.errors import BesaError, BesaWarning
from besa.export import ExportConfig, export
from besa.export.onnx.check import check_graph
from besa.export.onnx.decoder import Decoder, Reference, compare
from besa.export.onnx.float_graph import reference_of
from besa.export.onnx.runtime import NAME, genai, open_session, ort_library
from besa.model.blocks import find_blocks
from besa.model.loading import load_model
from tests.export.sparse import pruned_model, put_zeros
from tests.helpers import random_model, run, save_with_tokenizer
from tests.tiny import tiny_model as tiny_wrapper

try:
    LIBRARY = ort_library()
except BesaError as error:
    pytest.skip(str(error), allow_module_level=True)

HEAD = 16

# What a precision costs: of the logits, relative.
DENSE = {"fp32": 1e-5, "fp16": 5e-3, "int8": 0.05, "int4": 0.5}
SPARSE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3, "int8": 0.05, "int4": 0.5}
VARIANTS = [
    *((False, name) for name in DENSE),
    *((True, name) for name in SPARSE),
]


def masked(tiny_model: Path, directory: Path, seed: int, rate: float = 0.5) -> Path:
    """The tiny model with zeros that `seed` chooses."""
    shutil.copytree(tiny_model, directory)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if seed:  # other zeros at the same places of another order
        for parameter in model.parameters():
            parameter.data = parameter.data.flip(0)
        put_zeros(model, rate)
        for parameter in model.parameters():
            parameter.data = parameter.data.flip(0)
    else:
        put_zeros(model, rate)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pruned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return masked(tiny_model, tmp_path_factory.mktemp("models") / "pruned", seed=0)


@pytest.fixture(scope="module")
def other(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under another mask."""
    return masked(tiny_model, tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="module")
def reference(pruned: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def graphs(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, str], Path]:
    """Every variant of the pruned model."""
    folder = tmp_path_factory.mktemp("graphs")
    made = {}
    for sparse, precision in VARIANTS:
        out = folder / f"{'sparse' if sparse else 'dense'}-{precision}"
        config = ExportConfig(out=out, format="onnx", sparse=sparse, precision=precision)
        made[sparse, precision] = export(pruned, config).out
    return made


def decoder(directory: Path, library: str | None = LIBRARY) -> Decoder:
    return Decoder(open_session(directory / "model.onnx", library, threads=1), HEAD)


def record_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "besa.json").read_text())
    return found


def test_besa_bench_knows_what_is_packed(
    graphs: dict[tuple[bool, str], Path], pruned: Path
) -> None:
    for (sparse, precision), directory in graphs.items():
        found = packing(directory)
        assert found == (Packing(precision, "unstructured") if sparse else None)
    assert packing(pruned) is None


@pytest.mark.parametrize(("sparse", "precision"), VARIANTS)
def test_logits_are_transformers(
    graphs: dict[tuple[bool, str], Path], reference: Any, sparse: bool, precision: str
):
    """A prompt, then token by token with what was kept."""
    bound = (SPARSE if sparse else DENSE)[precision]
    found = compare(decoder(graphs[sparse, precision]), reference, seed=7)
    assert found.error < bound
    assert found.tokens == 16
    if bound < 0.03:
        assert found.agreement > 0.9


def test_the_export_compares_too(graphs: dict[tuple[bool, str], Path]):
    for (sparse, precision), directory in graphs.items():
        check = record_of(directory)["check"]
        assert check["error"] < (SPARSE if sparse else DENSE)[precision]
        assert check["dtype"] == "float32"


def test_another_mask_is_caught(graphs: dict[tuple[bool, str], Path], other: Path):
    """The control: by the comparison, also in the coarsest precision."""
    theirs = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    for directory in graphs.values():
        assert compare(decoder(directory), theirs).error > 0.6


def test_a_step_with_the_cache_is_the_prompt_at_once(graphs: dict[tuple[bool, str], Path]):
    tokens = np.arange(3, 23)[None]
    for key in ((False, "fp32"), (True, "bf16"), (True, "int8")):
        graph = decoder(graphs[key])
        whole = graph(tokens)
        graph.reset()
        steps = np.concatenate([graph(tokens[:, at : at + 1]) for at in range(20)], 1)
        assert np.linalg.norm(whole - steps) < 1e-4 * np.linalg.norm(whole)


def test_packed_int8_is_what_transformers_makes_of_the_packed_checkpoint(
    graphs: dict[tuple[bool, str], Path], pruned: Path, tmp_path: Path
):
    """The same numbers in the blocks; the head alone, which is not int8 there, tells them apart."""
    packed = export(pruned, ExportConfig(out=tmp_path / "packed", quantize="int8")).out
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    found = compare(decoder(graphs[True, "int8"]), theirs)
    assert found.error < 0.04
    assert found.error < 0.8 * compare(decoder(graphs[False, "int8"]), theirs).error


def test_packed_int4_is_what_transformers_makes_of_the_packed_checkpoint(
    graphs: dict[tuple[bool, str], Path], pruned: Path, tmp_path: Path
):
    packed = export(pruned, ExportConfig(out=tmp_path / "packed", quantize="int4")).out
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    assert compare(decoder(graphs[True, "int4"]), theirs).error < 0.04


def test_int8_with_a_scale_for_each_group_of_columns(pruned: Path, reference: Any, tmp_path: Path):
    wish = {"sparse": True, "precision": "int8", "group_size": 32}
    out = export(pruned, ExportConfig(out=tmp_path / "x", format="onnx", **wish)).out
    assert compare(decoder(out), reference).error < SPARSE["int8"]
    assert compare(decoder(out, library=None), reference).error < SPARSE["int8"]
    model = onnx.load(out / "model.onnx", load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "SparseMatMul"]
    assert {a.i for node in products for a in node.attribute if a.name == "group_size"} == {32}


def greedy(directory: Path, prompt: list[int], count: int) -> list[int]:
    og = genai()
    model = og.Model(str(directory))
    wish = og.GeneratorParams(model)
    total = len(prompt) + count
    wish.set_search_options(max_length=total, min_length=total, do_sample=False)
    generator = og.Generator(model, wish)
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def expected(model: Any, prompt: list[int], count: int) -> list[int]:
    found = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return [int(token) for token in found[0, len(prompt) :]]


@pytest.mark.parametrize(
    ("sparse", "precision"), [(False, "fp32"), (True, "fp32"), (True, "bf16"), (True, "fp16")]
)
def test_greedy_tokens_in_genai(
    graphs: dict[tuple[bool, str], Path], reference: Any, sparse: bool, precision: str
):
    """The directory as it is: genai_config.json names the operator's library."""
    prompt = [72, 101, 108, 108, 111, 32, 119]
    found = greedy(graphs[sparse, precision], prompt, 24)
    assert found == expected(reference, prompt, 24)


def test_packed_weights_are_small_on_the_disk(graphs: dict[tuple[bool, str], Path]):
    dense, packed = record_of(graphs[False, "int8"]), record_of(graphs[True, "int8"])
    linears = [one for one in packed["packed"] if one["sparse"]]
    assert len(linears) == 3 * 5  # of a block: the fused q, k and v, o, gate, up, down
    weights = sum(one["shape"][0] * one["shape"][1] for one in linears)
    assert sum(one["bytes"] for one in linears) < 0.7 * weights
    assert packed["bytes"] < dense["bytes"]
    for one in record_of(graphs[True, "bf16"])["packed"]:
        values, bits = one["nonzeros"] * 2, one["shape"][0] * one["shape"][1] / 8
        assert one["bytes"] == pytest.approx(values + bits)


def test_no_weight_is_there_twice(graphs: dict[tuple[bool, str], Path]):
    """Nothing dense is left beside a packed weight: every byte of the data has one owner."""
    for key, directory in graphs.items():
        model = onnx.load(directory / "model.onnx", load_external_data=False)
        used = {name for node in model.graph.node for name in node.input}
        parts = []
        for tensor in model.graph.initializer:
            assert tensor.name in used
            where = {entry.key: entry.value for entry in tensor.external_data}
            parts.append((int(where["offset"]), int(where["length"])))
        parts.sort()
        for (start, length), (following, _) in pairwise(parts):
            assert start + length <= following, key


def test_it_runs_without_the_library_while_it_is_small(
    graphs: dict[tuple[bool, str], Path], reference: Any
):
    for precision in ("bf16", "int8"):
        found = compare(decoder(graphs[True, precision], library=None), reference)
        assert found.error < SPARSE[precision]


def test_a_large_model_has_no_function_and_needs_the_library(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("besa.export.onnx.sparse.SMALL", 1000)
    out = export(pruned, ExportConfig(out=tmp_path / "x", format="onnx", sparse=True)).out
    assert not onnx.load(out / "model.onnx", load_external_data=False).functions
    with pytest.raises(BesaError, match="SparseMatMul"):
        decoder(out, library=None)


def test_a_standard_graph(pruned: Path, reference: Any, tmp_path: Path):
    out = export(pruned, ExportConfig(out=tmp_path / "x", format="onnx", onnx_graph="standard")).out
    model = onnx.load(out / "model.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert {one.domain: one.version for one in model.opset_import}[""] == 23
    onnx.checker.check_model(str(out / "model.onnx"))
    assert compare(decoder(out, library=None), reference).error < 1e-5
    prompt = [72, 101, 108]
    assert greedy(out, prompt, 12) == expected(reference, prompt, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "graphs"), [("gpt2", (False, True)), ("gemma3_text", (True,))])
def test_what_the_builder_does_not_know_becomes_a_standard_graph(
    family: str, graphs: tuple[bool, ...], tiny_model: Path, tmp_path: Path
):
    model = pruned_model(family, tmp_path / "model", tiny_model)
    for number, sparse in enumerate(graphs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = ExportConfig(out=tmp_path / f"{number}", format="onnx", sparse=sparse)
            record = export(model, config).record
        said = [str(one.message) for one in caught if "standard one" in str(one.message)]
        assert len(said) == 1
        assert record.graph == "standard"
        assert record.check.error < 1e-5
        assert bool(record.packed) == sparse


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "phi3"])
def test_families_of_the_builder(family: str, tiny_model: Path, tmp_path: Path):
    """Biases, windows, tied embeddings, fused products."""
    wide = {"hidden_size": 64, "head_dim": 16} if family != "phi3" else {"hidden_size": 64}
    model = pruned_model(family, tmp_path / "model", tiny_model, **wide)
    for sparse, precision in ((False, "fp32"), (True, "fp32"), (True, "int8")):
        out = tmp_path / f"{sparse}-{precision}"
        config = ExportConfig(out=out, format="onnx", sparse=sparse, precision=precision)
        record = export(model, config).record
        assert record.graph == "genai"
        # Scores that are capped go through an approximation of tanh.
        exact = 1e-3 if family == "gemma2" else 1e-5
        assert record.check.error < (0.1 if precision == "int8" else exact)


def test_the_card_of_a_2_4_model_tells_of_tensorrt(tiny_model: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    directory = tmp_path / "pruned"
    shutil.copytree(tiny_model, directory)
    put_zeros(model, pattern=(2, 4)).save_pretrained(directory)
    settings = {"pattern": "2:4", "method": "wanda"}
    record = {"model": "m", "settings": settings, "sparsity": {"achieved": 0.5, "target": 0.5}}
    (directory / "besa.json").write_text(json.dumps(record))
    dense = export(directory, ExportConfig(out=tmp_path / "dense", format="onnx")).out
    assert "trt_sparsity_enable" in (dense / "README.md").read_text()
    zeros = onnx.load(dense / "model.onnx", load_external_data=True)
    shares = [
        float((onnx.numpy_helper.to_array(one) == 0).mean())
        for one in zeros.graph.initializer
        if ".layers." in one.name and "MatMul" in one.name
    ]
    assert min(shares) >= 0.5  # dense, with its zeros
    sparse = export(directory, ExportConfig(out=tmp_path / "sparse", format="onnx", sparse=True))
    assert sparse.record.pattern == "2:4"
    assert "trt_sparsity_enable" not in (sparse.out / "README.md").read_text()


def test_what_the_command_prints_and_writes(pruned: Path, tmp_path: Path):
    words = ("export", "--format", "onnx", pruned, "--sparse", "--precision", "bf16")
    process = run(*words, "--out", "out", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    first, second, third = process.output.splitlines()
    assert first.startswith("out: a sparse graph (genai), bf16, ")
    assert re.match(r"16 products on packed weights, 15 of them pruned: \d+", second)
    assert re.match(r"logits \S+ \(relative\) off transformers' in float32, ", third)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "genai_config.json", "besa.json", NAME}
    assert names >= {"README.md", "config.json", "tokenizer.json"}
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--precision", "int3"], "a dense graph has one of fp32, fp16, int8, int4"),
        (["--sparse", "--precision", "int3"], "a sparse graph has one of bf16, fp16, fp32, int8"),
        (["--quantize", "int8"], "--format onnx takes --precision int8, not --quantize"),
        (["--group-size", "32"], "--group-size is for --sparse --precision int8"),
        (["--onnx-graph", "other"], "choose one of genai, standard"),
        (["--onnx-graph", "standard", "--precision", "int8"], "standard is fp32 or --sparse"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, flags: list[str], words: str):
    process = run("export", "--format", "onnx", "x", "--out", "y", *flags, cwd=tmp_path)
    assert process.returncode == 2
    assert words in process.errors
    assert process.errors.count("\n") == 1


def test_onnx_flags_with_another_format(tmp_path: Path):
    process = run("export", "x", "--out", "y", "--sparse", cwd=tmp_path)
    assert process.returncode == 2
    assert "are for --format onnx" in process.errors


def test_an_unpruned_model(tiny_model: Path, tmp_path: Path):
    with pytest.raises(BesaError, match="is not pruned: no linear has more zeros"):
        export(tiny_model, ExportConfig(out=tmp_path / "x", format="onnx", sparse=True))
    assert not list(tmp_path.iterdir())


def test_a_precision_that_only_the_builder_makes(tiny_model: Path, tmp_path: Path):
    model = pruned_model("opt", tmp_path / "model", tiny_model)
    with pytest.raises(BesaError, match=r"has no graph for .*; without --precision it becomes"):
        export(model, ExportConfig(out=tmp_path / "x", format="onnx", precision="int8"))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_head_size_that_the_fused_attention_does_not_take(tiny_model: Path, tmp_path: Path):
    model = pruned_model("llama", tmp_path / "model", tiny_model)  # heads of 8
    with pytest.warns(BesaWarning, match=r"head_size shall be a multiple .* a standard one"):
        record = export(model, ExportConfig(out=tmp_path / "x", format="onnx")).record
    assert record.graph == "standard"
    assert record.check.error < 1e-5


def test_a_graph_that_is_another_model_does_not_appear(
    pruned: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What the builder reads changes under its hands; the comparison sees it."""
    from besa.export.onnx import float_graph
    from besa.export.onnx.builder import build as real

    monkeypatch.setattr(
        float_graph, "build", lambda _source, *rest, **options: real(other, *rest, **options)
    )
    with pytest.raises(BesaError, match=r"logits are off by .* without --precision it becomes"):
        export(pruned, ExportConfig(out=tmp_path / "x", format="onnx", precision="int4"))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def scaled(tiny_model: Path, tmp_path: Path) -> Path:
    """Its positions are scaled by a quarter, which the builder does not do as transformers does."""
    directory = tmp_path / "scaled"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_positions_that_the_builder_gets_wrong(scaled: Path, tmp_path: Path):
    process = run("export", "--format", "onnx", scaled, "--out", "out", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    lines = [line for line in process.errors.splitlines() if line.startswith("besa export: ")]
    assert len(lines) == 1
    assert "logits are off by" in lines[0]
    assert lines[0].endswith("it becomes a standard one")
    record = record_of(tmp_path / "out")
    assert record["graph"] == "standard"
    assert record["check"]["error"] < 1e-5
    assert record["check"]["tokens"] == 64


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounding_hides_no_wrong_graph(scaled: Path, tmp_path: Path, precision: str):
    words = ("export", "--format", "onnx", scaled, "--out", "out", "--precision", precision)
    process = run(*words, cwd=tmp_path)
    assert process.returncode == 2
    line = process.errors.splitlines()[-1]
    assert "without --precision it becomes a standard one" in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 64),
        ({"sliding_window": 100}, 164),
        ({"sliding_window": 100, "max_position_embeddings": 128}, 128),
        ({"sliding_window": 4096}, 2048),
        ({"rope_parameters": {"original_max_position_embeddings": 300}}, 364),
        ({"rope_parameters": {"full": {"original_max_position_embeddings": 300}}}, 364),
    ],
)
def test_the_text_is_longer_than_any_boundary(settings: dict[str, Any], tokens: int):
    from transformers import PretrainedConfig

    class Model:
        config = PretrainedConfig(vocab_size=50, **settings)
        dtype = torch.float32

        def __call__(self, ids: torch.Tensor, **_: Any) -> Any:
            return type("Output", (), {"logits": torch.zeros(*ids.shape, 50)})

    assert reference_of(Model()).tokens.shape == (1, tokens)


def test_what_goes_wrong_far_into_a_text_is_seen():
    logits = torch.randn(1, 640, 50, generator=torch.Generator().manual_seed(0))
    expected = Reference(np.zeros((1, 640), np.int64), logits, "float32")

    class Late(Decoder):
        def __init__(self) -> None:
            pass

        def reset(self) -> None:
            self.length = 0

        def __call__(self, tokens: np.ndarray) -> np.ndarray:
            start, self.length = self.length, self.length + tokens.shape[1]
            positions = torch.arange(start, self.length)[:, None]
            return torch.where(positions >= 600, 0.0, logits[0, start : self.length])[None].numpy()

    assert expected.check(Late()).error > 0.7


def test_sampling_is_the_checkpoints(pruned: Path, tmp_path: Path):
    """As transformers generates by default, with its penalty of repetitions."""
    directory = tmp_path / "model"
    shutil.copytree(pruned, directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.7}))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    out = export(directory, ExportConfig(out=tmp_path / "x", format="onnx")).out
    prompt = [72, 101, 108, 108, 111, 32, 119]
    found = greedy(out, prompt, 24)
    assert found == expected(theirs, prompt, 24)
    theirs.generation_config.repetition_penalty = 1.0
    assert found != expected(theirs, prompt, 24)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "falcon"])
def test_what_is_hard_to_trace_becomes_a_standard_graph(
    family: str, tiny_model: Path, tmp_path: Path
):
    """Experts that see as many tokens as the router sends them, and keys that all heads share."""
    model = save_with_tokenizer(random_model(family), tmp_path / "model", tiny_model)
    with pytest.warns(BesaWarning, match="it becomes a standard one"):
        record = export(model, ExportConfig(out=tmp_path / "x", format="onnx")).record
    assert record.graph == "standard"
    assert record.check.error < 1e-5


def wrapper(family: str, directory: Path, tiny_model: Path, **text: Any) -> Path:
    """A model that sees, with zeros in the blocks of its text decoder."""
    model = tiny_wrapper(family, seen=True, text_config=text)
    blocks, _ = find_blocks(model)
    put_zeros(model, where=lambda name: name.startswith(f"{blocks}."))
    return save_with_tokenizer(model, directory, tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mistral3", "the genai graph's logits are off by "),
        ("qwen2_5_vl", "cannot run the graph of .*Invalid rank for input: position_ids"),
    ],
)
def test_the_decoder_inside_of_a_model_that_sees(
    family: str, reason: str, tiny_model: Path, tmp_path: Path
):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    rope |= {"mrope_section": [2, 3, 3]} if family == "qwen2_5_vl" else {}
    size = {"hidden_size": 64, "head_dim": 16, "rope_parameters": rope}
    model = wrapper(family, tmp_path / "model", tiny_model, **size)
    with pytest.warns(BesaWarning, match=rf"{reason}.*; it becomes a standard one"):
        result = export(model, ExportConfig(out=tmp_path / "x", format="onnx", sparse=True))
    record = result.record
    assert record.graph == "standard"
    assert record.check.error < 1e-5
    assert len(record.packed) == 14  # seven in each of two blocks, none of the tower's
    theirs = load_model(model, "float32", "cpu")
    prompt = [72, 101, 108]
    assert greedy(result.out, prompt, 12) == expected(theirs, prompt, 12)


@pytest.mark.parametrize("family", ["bamba", "deepseek_v3"])
def test_what_has_no_graph_is_one_sentence(family: str, tiny_model: Path, tmp_path: Path):
    save_with_tokenizer(random_model(family), tmp_path / "model", tiny_model)
    process = run("export", "--format", "onnx", "model", "--out", "out", cwd=tmp_path)
    assert process.returncode == 2
    *progress, line = process.errors.splitlines()
    assert all(re.fullmatch(r"(building|checking) the graph", one) for one in progress)
    assert line.startswith("besa export: ")
    assert line.endswith("so there is no ONNX graph of it: serve the checkpoint itself")
    assert "\x1b" not in line
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"model"}


def test_data_that_are_cut_off_or_missing(graphs: dict[tuple[bool, str], Path], tmp_path: Path):
    shutil.copytree(graphs[True, "int8"], tmp_path / "cut")
    data = tmp_path / "cut" / "model.onnx.data"
    size = data.stat().st_size
    os.truncate(data, size - 1)
    for refuse in (check_graph, open_session):
        with pytest.raises(BesaError, match=f"is cut off: it has {size - 1:,} bytes"):
            refuse(tmp_path / "cut" / "model.onnx")
    data.unlink()
    with pytest.raises(BesaError, match="is missing: copy it"):
        open_session(tmp_path / "cut" / "model.onnx")
    (tmp_path / "cut" / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(BesaError, match="is missing or damaged"):
        open_session(tmp_path / "cut" / "model.onnx")


@pytest.mark.parametrize("asked", [None, "0"])
def test_telemetry_is_off_unless_the_user_turned_it_on(asked: str | None):
    """Before the import, which is when ONNX Runtime looks."""
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'onnxruntime':\n"
        "            print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "import besa.export.onnx.runtime as ort\n"
        "sys.meta_path.insert(0, Watch())\n"
        "ort.runtime()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if asked is not None:
        environment["ORT_DISABLE_TELEMETRY"] = asked
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert set(found.stdout.split()) == {asked or "1"}


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else real(name)
    )
    with pytest.raises(BesaError, match=r"onnx not installed: pip install 'besa\[onnx\]'"):
        export("x", ExportConfig(out=tmp_path / "x", format="onnx"))
