"""`besa export --format onnx --device cuda`: graphs, and their logits by kernels run on the CPU."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from onnx import NodeProto, TensorProto
from transformers import AutoModelForCausalLM

from besa.cli import main
from besa.errors import BesaError
from besa.export import ExportConfig, export
from besa.export.onnx.check import check_graph
from besa.export.onnx.decoder import Decoder, compare
from besa.export.onnx.machine_code import Instance, instances, read_table
from besa.export.onnx.runtime import NAME, open_session, ort_library
from besa.formats import pack
from besa.kernels.cuda import compiler
from besa.kernels.cuda.records import Records, to_packed
from tests.export.onnx.cuda_on_cpu import driver_on_cpu, operator_library
from tests.export.sparse import pruned_model, put_zeros
from tests.helpers import run
from tests.kernels.cuda.emulation import needs_compiler

try:
    LIBRARY = ort_library()
except BesaError as error:
    pytest.skip(str(error), allow_module_level=True)
if compiler.nvrtc() is None:
    pytest.skip("no NVRTC", allow_module_level=True)

HEAD = 16
FP16, BF16 = torch.float16, torch.bfloat16

# Settings of a graph, and what they cost: of the logits, relative.
GRAPHS: dict[str, tuple[dict[str, Any], float]] = {
    "fp16": ({}, 5e-3),
    "int8": ({"precision": "int8"}, 0.05),
    "int8 in groups": ({"precision": "int8", "group_size": 32}, 0.05),
    "bf16": ({"precision": "bf16"}, 0.0),  # which the CPU's ONNX Runtime cannot run
}


@pytest.fixture(scope="module")
def pruned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the weights, and in one of the blocks 2 of 4."""
    directory = tmp_path_factory.mktemp("models") / "pruned"
    shutil.copytree(tiny_model, directory)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    put_zeros(model, pattern=(2, 4), where=lambda name: ".layers.1." in name)
    put_zeros(model, where=lambda name: ".layers." in name and ".layers.1." not in name)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reference(pruned: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def graphs(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    made = {}
    for name, (settings, _) in GRAPHS.items():
        config = ExportConfig(
            out=folder / name.replace(" ", "-"),
            format="onnx",
            sparse=True,
            device="cuda",
            **settings,
        )
        made[name] = export(pruned, config).out
    return made


def products(directory: Path) -> tuple[list[NodeProto], dict[str, torch.Tensor]]:
    """The nodes of besa's operator, and the initializers that they read."""
    graph = onnx.load(directory / "model.onnx").graph
    nodes = [node for node in graph.node if node.op_type == "SparseMatMul"]
    used = {name for node in nodes for name in node.input}
    tensors = {
        one.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(one)))
        for one in graph.initializer
        if one.name in used
    }
    return nodes, tensors


def records_of(node: NodeProto, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Records:
    numbers = {one.name: one.i for one in node.attribute}
    return Records(
        tensors[node.input[1]],
        tensors.get(node.input[2]),
        numbers["out_features"],
        numbers["in_features"],
        numbers["capacity"],
        torch.int8 if node.input[3] else dtype,
    )


def instances_of(directory: Path, dtype: torch.dtype) -> set[Instance]:
    nodes, tensors = products(directory)
    found: set[Instance] = set()
    for node in nodes:
        group = next(one.i for one in node.attribute if one.name == "group_size") or None
        found.update(instances(records_of(node, tensors, dtype), group, dtype))
    return found


def test_nodes_and_their_initializers(graphs: dict[str, Path]) -> None:
    for name, directory in graphs.items():
        check_graph(directory / "model.onnx")
        dtype = BF16 if name == "bf16" else FP16
        nodes, tensors = products(directory)
        assert len(nodes) == 3 * 5  # of a block: the fused q, k and v, o, gate, up, down
        assert {node.domain for node in nodes} == {"ai.besa"}
        assert {node.input[4] for node in nodes} == {"besa.code"}
        for node in nodes:
            records = records_of(node, tensors, dtype)
            assert records.two_four == ("layers.1" in node.name and "int8" not in name)
            assert (records.offsets is None) == (node.input[2] == "")
            assert (node.input[3] != "") == ("int8" in name)
        # Every instance that a node needs, and none twice.
        entries = read_table(tensors["besa.code"].numpy().tobytes())
        for architecture in {entry.architecture for entry in entries}:
            ours = [entry for entry in entries if entry.architecture == architecture]
            assert len(ours) == len(instances_of(directory, dtype))
        model = onnx.load(directory / "model.onnx", load_external_data=False)
        assert not model.functions
        kinds = {one.name: one.data_type for one in model.graph.initializer}
        dense = {kinds[n.input[1]] for n in model.graph.node if n.op_type == "MatMul"}
        assert dense == {TensorProto.BFLOAT16 if name == "bf16" else TensorProto.FLOAT16}


def test_records_are_the_weights(graphs: dict[str, Path], reference: Any) -> None:
    weights = dict(reference.named_parameters())
    nodes, tensors = products(graphs["fp16"])
    seen = 0
    for node in nodes:
        found = re.search(r"layers\.(\d+)/(?:attn/(o_proj)|mlp/(down_proj|up_proj))", node.name)
        if not found:
            continue
        seen += 1
        part = f"self_attn.{found[2]}" if found[2] else f"mlp.{found[3]}"
        packed = pack(weights[f"model.layers.{found[1]}.{part}.weight"].data.to(FP16))
        values, bitmask, _ = to_packed(records_of(node, tensors, FP16))
        assert torch.equal(bitmask, packed.bitmask)
        assert torch.equal(values, packed.values)
    assert seen == 9


def test_the_record_and_the_card_say_what_it_is_for(graphs: dict[str, Path]) -> None:
    for name, directory in graphs.items():
        record = json.loads((directory / "besa.json").read_text())
        assert (record["device"], record["check"]) == ("cuda", None)
        assert record["precision"] == GRAPHS[name][0].get("precision", "fp16")
        assert len(record["packed"]) == 15
        card = (directory / "README.md").read_text()
        assert "untested on GPUs" in card
        assert "CUDAExecutionProvider" in card
        assert "besa[onnx-gpu" in card
        config = json.loads((directory / "genai_config.json").read_text())
        options = config["model"]["decoder"]["session_options"]
        assert options["custom_ops_library"] == NAME
        assert [list(one) for one in options["provider_options"]] == [["cuda"]]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "bf16"])
def test_logits_are_transformers(
    graphs: dict[str, Path], reference: Any, name: str, tmp_path: Path
) -> None:
    """Of the whole graph in ONNX Runtime, by the operator and the kernels that a GPU would run."""
    wanted = {one for one in instances_of(graphs[name], FP16) if one.tokens <= 16}
    library = operator_library(driver_on_cpu(wanted))
    # A GPU's initializers are copied to aligned memory. Here those of one file are.
    onnx.save(onnx.load(graphs[name] / "model.onnx"), tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", library, threads=1)
    found = compare(Decoder(session, HEAD), reference, seed=3)
    assert found.error < GRAPHS[name][1]
    if name == "fp16":
        assert found.agreement > 0.9


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_families(family: str, tiny_model: Path, tmp_path: Path) -> None:
    """Biases, windows, tied embeddings, fused products."""
    wide = {"hidden_size": 64, "head_dim": 16} if family != "phi3" else {"hidden_size": 64}
    source = pruned_model(family, tmp_path / "model", tiny_model, **wide)
    config = ExportConfig(out=tmp_path / "x", format="onnx", sparse=True, device="cuda")
    out = export(source, config).out
    library = operator_library(
        driver_on_cpu(one for one in instances_of(out, FP16) if one.tokens <= 16)
    )
    onnx.save(onnx.load(out / "model.onnx"), tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", library, threads=1)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    described = json.loads((out / "genai_config.json").read_text())["model"]["decoder"]
    assert compare(Decoder(session, described["head_size"]), reference).error < 5e-3


def test_a_dense_graph_that_only_a_gpu_can_run(tiny_model: Path, tmp_path: Path) -> None:
    """Its attention norms queries and keys, which the CPU's does not."""
    wide = {"hidden_size": 64, "head_dim": 16}
    source = pruned_model("qwen3", tmp_path / "model", tiny_model, **wide)
    config = ExportConfig(out=tmp_path / "x", format="onnx", precision="fp16")
    record = export(source, config).record
    assert (record.device, record.check) == ("cuda", None)


def test_a_session_without_a_gpu(graphs: dict[str, Path]) -> None:
    with pytest.raises(BesaError, match="SparseMatMul") as caught:
        open_session(graphs["fp16"] / "model.onnx", LIBRARY)
    assert "\n" not in str(caught.value)


def test_dense_graphs_for_gpus(pruned: Path, tmp_path: Path) -> None:
    """Their logits are compared where the CPU has the kernels for it."""
    for precision, bound in ((None, 5e-3), ("int4", 0.5)):
        out = tmp_path / str(precision)
        config = ExportConfig(out=out, format="onnx", device="cuda", precision=precision)
        record = export(pruned, config).record
        assert (record.device, record.precision) == ("cuda", precision or "fp16")
        assert record.check is None or record.check.error < bound
        options = json.loads((out / "genai_config.json").read_text())["model"]["decoder"]
        assert list(options["session_options"]["provider_options"][0]) == ["cuda"]


def test_what_the_command_prints(pruned: Path, tmp_path: Path) -> None:
    words = ("export", "--format", "onnx", pruned, "--sparse", "--device", "cuda")
    process = run(*words, "--out", "out", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    first, second, third = process.output.splitlines()
    assert first.startswith("out: a sparse graph (genai) for cuda, fp16, ")
    assert re.match(r"15 products on packed weights, 15 of them pruned: \d+", second)
    assert third.startswith("untested on GPUs: its kernels ran on one outside ONNX Runtime, ")
    assert third.endswith("the graph on none; logits not compared")


def test_without_nvrtc(
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compiler, "nvrtc", lambda: None)
    words = ["export", "--format", "onnx", str(pruned), "--sparse", "--device", "cuda"]
    assert main([*words, "--out", str(tmp_path / "x")]) == 2
    errors = capsys.readouterr().err
    assert "--device cuda needs NVRTC (libnvrtc.so)" in errors
    assert "pip install nvidia-cuda-nvrtc" in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sparse", "--precision", "fp32"], "a sparse CUDA graph has one of fp16, bf16, int8"),
        (["--precision", "int8"], "a dense CUDA graph has one of fp16, int4"),
        (["--onnx-graph", "standard"], "--device cuda takes --onnx-graph genai"),
        (["--device", "tpu"], "choose one of cpu, cuda"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, flags: list[str], words: str) -> None:
    command = ("export", "--format", "onnx", "x", "--out", "y", "--device", "cuda", *flags)
    process = run(*command, cwd=tmp_path)
    assert process.returncode == 2
    assert words in process.errors
    assert process.errors.count("\n") == 1


def test_a_model_without_zeros(tiny_model: Path, tmp_path: Path) -> None:
    config = ExportConfig(out=tmp_path / "x", format="onnx", sparse=True, device="cuda")
    with pytest.raises(BesaError, match="not pruned"):
        export(tiny_model, config)
    assert not list(tmp_path.iterdir())
