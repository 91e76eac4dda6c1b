"""A checkpoint as an ONNX graph: one that runs anywhere, or one on packed weights.

>>> config = ExportConfig(out="onnx", format="onnx", precision="int8")
>>> export_onnx("path/to/pruned", config, tell=lambda event: None).out
PosixPath('onnx')

Dense: the graph of ONNX Runtime GenAI's model builder, or of standard operators where it is asked
for or the builder's is not the model (besa.export.onnx.float_graph). Sparse: the same with its
products on packed weights (besa.export.onnx.sparse, for NVIDIA GPUs besa.export.onnx.records), and
besa's operator library beside it. Either is checked before it appears: by onnx.checker, and by its
logits, which have to be transformers' up to what the precision costs. Those of a graph that only a
GPU can run are not compared.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import onnx_ir as ir
import torch

from besa.errors import BesaError, interruptible
from besa.export.config import ExportConfig, ExportResult
from besa.export.onnx.builder import DATA, MODEL, build
from besa.export.onnx.card import onnx_card
from besa.export.onnx.check import check_graph
from besa.export.onnx.decoder import Reference
from besa.export.onnx.float_graph import CannotRunError, check_logits, float_graph, reference_of
from besa.export.onnx.machine_code import need_nvrtc
from besa.export.onnx.records import pack_for_cuda
from besa.export.onnx.runtime import NAME, distribution, ort_library
from besa.export.onnx.sampling import keep_sampling
from besa.export.onnx.sparse import OnnxPacking, pack_graph
from besa.export.plan import plan_packing
from besa.export.rounded import peak_of
from besa.export.source import open_plain
from besa.machine import give_memory_back, memory, peak_memory
from besa.model.checkpoint import Checkpoint
from besa.model.export_record import LogitsCheck, OnnxRecord, PackedProduct
from besa.model.files import GENAI_CONFIG
from besa.model.loading import load_model
from besa.model.prune_record import PruneRecord
from besa.model.quiet import quiet
from besa.model.record import read_raw_record, read_record, write_record
from besa.model.workspace import Workspace, check_free
from besa.progress import Event, Tell
from besa.version import __version__, versions
from besa.writing import sha256, write_text

_VALUES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int8": "int8", "int4": "int4"}
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# Bytes of a weight on the disk, about.
_BYTES = {"fp32": 4.0, "bf16": 2.2, "fp16": 2.2, "int8": 1.4, "int4": 1.0}

# Bytes from which on a constant of a standard graph is in the file of data.
_EXTERNAL = 256

# The relative error of the logits beyond which a graph is no longer the model: roundings stay far
# below, and a part that is missing or in the wrong place gives about 1.
_MOST_ERROR = {"fp32": 0.05, "bf16": 0.05, "fp16": 0.05, "int8": 0.35, "int4": 0.8}


def export_onnx(pruned: str | Path, config: ExportConfig, tell: Tell) -> ExportResult:
    """Writes the ONNX model; see `besa.export.export`."""
    started = time.monotonic()
    out = Path(config.out)
    check_free(out, config.overwrite)
    library = ort_library() if config.sparse else None
    if config.sparse and config.device == "cuda":
        need_nvrtc()
    checkpoint = open_plain(pruned, config.trust_remote_code)
    directory = checkpoint.directory
    precision, device = _precision(config, checkpoint), _device(config)
    pattern = _pattern(checkpoint, config, tell)
    settings = {
        "command": "export",
        "format": "onnx",
        "sparse": config.sparse,
        "precision": precision,
        "group_size": config.group_size,
        "device": device,
        "graph": config.onnx_graph,
        "model": str(pruned),
        "model_fingerprint": checkpoint.fingerprint(),
        "besa": __version__,
    }
    weights = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    needed = int(weights * max(_BYTES.values()))  # the float graph is there first
    with Workspace.open(out, settings, config.overwrite, needed) as workspace:
        path = workspace.path
        workspace.begin_anew()  # there is no half of a graph to go on from
        try:
            with interruptible("run the same command again"):
                checkpoint.copy_companions(path)
                expected = _reference(checkpoint, weights)
                graph, packed = _write_graph(
                    path, directory, config, precision, device, expected, tell
                )
                give_memory_back()
                _copy_library(path, library)
                keep_sampling(directory, path)
                tell(Event("checking", what="the graph", done=2, total=3))
                check_graph(path / MODEL)
                # No provider of the CPU has the operator on records.
                check = None
                if not (config.sparse and device == "cuda"):
                    check = _check_precision(path, directory, precision, device, library, expected)
                record = OnnxRecord(
                    besa_version=__version__,
                    model=str(pruned),
                    architecture=type(checkpoint.model).__name__,
                    settings=settings,
                    versions=versions() | _onnx_versions(),
                    seconds=round(time.monotonic() - started, 3),
                    peak_memory_bytes=peak_memory(),
                    digests={name: sha256(path / name) for name in (MODEL, DATA)},
                    format="onnx",
                    source=read_raw_record(directory),
                    graph=graph,
                    device=device,
                    sparse=config.sparse,
                    precision=precision,
                    group_size=config.group_size,
                    pattern=pattern,
                    packed=tuple(packed),
                    bytes=(path / DATA).stat().st_size,
                    source_bytes=checkpoint.nbytes,
                    check=check,
                )
            record = write_record(record, path)
            write_text(onnx_card(record), path / "README.md")
        except BaseException:
            shutil.rmtree(path)
            raise
        workspace.publish()
    return ExportResult(out, record)


def _precision(config: ExportConfig, checkpoint: Checkpoint) -> str:
    if config.precision:
        return config.precision
    if config.device == "cuda":
        return "fp16"
    return _NAMES[checkpoint.dtype] if config.sparse else "fp32"


def _device(config: ExportConfig) -> str:
    """What computes the graph: a dense one of fp16 is for GPUs, unasked."""
    return "cuda" if config.precision == "fp16" and not config.sparse else config.device


def _pattern(checkpoint: Checkpoint, config: ExportConfig, tell: Tell) -> str | None:
    """The pattern of the zeros: read where they are packed, else as besa.json has it."""
    if config.sparse:
        return plan_packing(checkpoint, ExportConfig(out=config.out), tell).pattern
    source = read_record(checkpoint.directory)
    pattern = source.settings.get("pattern") if isinstance(source, PruneRecord) else None
    return pattern if isinstance(pattern, str) else None


def _write_graph(
    path: Path,
    directory: Path,
    config: ExportConfig,
    precision: str,
    device: str,
    expected: Reference,
    tell: Tell,
) -> tuple[str, list[PackedProduct]]:
    """Writes the graph; tells which kind it became, "genai" or "standard", and what is packed."""
    packed: list[PackedProduct] = []
    peak = peak_of(directory, config.group_size)
    packing = OnnxPacking(_VALUES.get(precision, precision), config.group_size, peak)

    def pack_weights(graph: ir.Model) -> None:
        tell(Event("packing", what="the graph", done=1, total=3))
        if device == "cuda":
            activations = torch.bfloat16 if precision == "bf16" else torch.float16
            packed.extend(pack_for_cuda(graph, packing, activations))
        else:
            packed.extend(pack_graph(graph, packing))

    tell(Event("building", what="the graph", done=1, total=3))
    floats = path / "float"
    floats.mkdir()
    kind = float_graph(directory, floats, config, precision, device, expected)
    if device == "cuda":
        plain = "fp16" if config.sparse and precision == "int8" else precision
        change = pack_weights if config.sparse else None
        build(directory, path, plain, change, device, config.trust_remote_code)
    elif precision != "fp32" and not config.sparse:
        build(directory, path, precision, trust_remote_code=config.trust_remote_code)
    else:
        if config.sparse:
            graph = ir.load(floats / MODEL)
            pack_weights(graph)
            graph.graph.sort()
            # As the one and the other write it: a standard graph's shapes have to be within it.
            least = 0 if kind == "genai" else _EXTERNAL
            ir.save(graph, path / MODEL, external_data=DATA, size_threshold_bytes=least)
            for name in (MODEL, DATA):
                (floats / name).unlink()
        for file in floats.iterdir():
            if file.is_dir():
                shutil.copytree(file, path / file.name, dirs_exist_ok=True)
            else:
                file.rename(path / file.name)
    shutil.rmtree(floats)
    return kind, packed


def _copy_library(path: Path, library: str | None) -> None:
    """Puts the operators' library beside a sparse graph."""
    if library is not None:
        shutil.copyfile(library, path / NAME)
        _name_library(path / GENAI_CONFIG)


def _name_library(path: Path) -> None:
    """Has GenAI load the library that lies beside the model: others it does not allow."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = NAME
    write_text(json.dumps(config, indent=4) + "\n", path)


def _reference(checkpoint: Checkpoint, weights: int) -> Reference:
    """transformers' logits, computed in float32 where there is room for two such models."""
    dtype = "float32" if 8 * weights < memory().available else "auto"
    with quiet():
        trust = checkpoint.trust_remote_code
        expected = reference_of(load_model(checkpoint.directory, dtype, "cpu", trust))
    give_memory_back()
    return expected


def _check_precision(
    path: Path,
    directory: Path,
    precision: str,
    device: str,
    library: str | None,
    expected: Reference,
) -> LogitsCheck | None:
    """Compares the finished graph's logits; None where only a GPU can run it.

    Raises:
        BesaError: they are off by more than the precision costs.
    """
    try:
        found = check_logits(path, directory, expected, library)
    except CannotRunError:
        if device == "cuda":
            return None
        raise
    if not found.error <= _MOST_ERROR[precision]:
        raise BesaError(
            f"{directory}: the graph's logits are off by {found.error:.2g} of transformers': "
            f"{precision} is too coarse for it, so give another --precision"
        )
    return found


def _onnx_versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("onnx", *filter(None, map(distribution, ("onnxruntime", "onnxruntime_genai"))))
    return {name: version(name) for name in names}
