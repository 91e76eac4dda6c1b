"""Packs a pruned checkpoint, block by block: a Hugging Face directory that serves as it is.

>>> pack_checkpoint("path/to/pruned", ExportConfig(out="sparse"), tell=lambda event: None).out
PosixPath('sparse')

Each linear of the decoder's blocks that has zeros enough is stored without them, as
besa.formats.checkpoint says; everything else is copied as it is. A block is a shard. Each is read
back from its file and compared with the source before it counts as finished.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from besa.errors import BesaError
from besa.export.config import ExportConfig, ExportResult
from besa.export.packable import PackedLinear
from besa.export.packed.card import packed_card
from besa.export.packed.record import packed_record
from besa.export.plan import PackingPlan, plan_packing
from besa.export.rounded import peak_of
from besa.export.source import open_plain
from besa.export.weights import pack_weight, quantize
from besa.formats import PackedConfig, packed_of, tensors_of
from besa.machine import give_memory_back
from besa.model.checkpoint import Checkpoint
from besa.model.export_record import PackedLinearRecord
from besa.model.files import open_tensors
from besa.model.json_files import read_object
from besa.model.quantization import without_notes
from besa.model.record import write_record
from besa.model.workspace import Workspace, check_free
from besa.progress import Event, Tell
from besa.typed_json import to_json
from besa.version import __version__
from besa.writing import write_text


def pack_checkpoint(pruned: str | Path, config: ExportConfig, tell: Tell) -> ExportResult:
    """Writes the packed checkpoint; see `besa.export.export`."""
    started = time.monotonic()
    out = Path(config.out)
    check_free(out, config.overwrite)
    checkpoint = open_plain(pruned, config.trust_remote_code)
    plan = plan_packing(checkpoint, config, tell)
    packed_config = PackedConfig(
        values=config.quantize or str(plan.dtype).removeprefix("torch."),
        ignore=plan.ignore,
        group_size=config.group_size,
        int8_input=not config.weight_only,
        pattern=plan.pattern,
        experts=plan.experts,
    )
    peak = peak_of(checkpoint.directory, config.group_size)
    settings = {
        "command": "export",
        "format": config.format,
        "quantize": config.quantize,
        "group_size": config.group_size,
        "weight_only": config.weight_only,
        "model": str(pruned),
        "model_fingerprint": checkpoint.fingerprint(),
        "nonzeros": sum(linear.nonzeros for linear in plan.packed),
        "besa": __version__,
    }
    saved = sum(
        linear.dense_bytes - linear.packed_bytes(config.quantize, config.group_size)
        for linear in plan.packed
    )
    needed = checkpoint.nbytes - saved
    with Workspace.open(out, settings, config.overwrite, needed) as workspace:
        with workspace.interruptible():
            shards = _write_shards(checkpoint, plan, packed_config, peak, workspace, tell)
        workspace.write_index(shards)
        checkpoint.copy_companions(workspace.path)
        described = checkpoint.directory / "config.json"
        model_config = without_notes(read_object(described))
        model_config["quantization_config"] = packed_config.to_dict()
        write_text(json.dumps(model_config, indent=2) + "\n", workspace.path / "config.json")
        size = sum((workspace.path / shard["file"]).stat().st_size for shard in shards)
        record = packed_record(
            checkpoint, plan, packed_config, settings, shards, size, time.monotonic() - started
        )
        record = write_record(record, workspace.path)
        write_text(packed_card(record), workspace.path / "README.md")
        workspace.publish()
    return ExportResult(out, record)


def _write_shards(
    checkpoint: Checkpoint,
    plan: PackingPlan,
    config: PackedConfig,
    peak: int,
    workspace: Workspace,
    tell: Tell,
) -> list[dict[str, Any]]:
    """The shards' records: first what belongs to no block, then each block."""
    blocks = len(checkpoint.blocks)
    finished = workspace.finished("others")
    if finished is None:
        with checkpoint.other_tensors() as tensors:
            finished = workspace.finish("others", workspace.shard(1, blocks + 1), tensors, {})
    shards = [finished]
    for index in range(blocks):
        name = f"block-{index:05d}"
        finished = workspace.finished(name)
        phase = "packing" if finished is None else "finished before:"
        what = f"{checkpoint.blocks_name}.{index}"
        tell(Event(phase, what=what, done=index + 1, total=blocks))
        if finished is None:
            linears = plan.of_block(index)
            tensors, written = _packed_block(checkpoint, index, linears, config, peak)

            def check(path: Path, linears: list[PackedLinear] = linears) -> None:
                verify(checkpoint, linears, config, path, peak)

            shard = workspace.shard(index + 2, blocks + 1)
            entry = {"linears": [to_json(linear) for linear in written]}
            finished = workspace.finish(name, shard, tensors, entry, check)
            del tensors
        shards.append(finished)
        give_memory_back()
    return shards


def _packed_block(
    checkpoint: Checkpoint,
    index: int,
    linears: list[PackedLinear],
    config: PackedConfig,
    peak: int,
) -> tuple[dict[str, Tensor], list[PackedLinearRecord]]:
    """A block's tensors as the shard holds them, and the packed linears' records."""
    by_key = {linear.key: linear for linear in linears}
    tensors: dict[str, Tensor] = {}
    written: dict[str, PackedLinearRecord] = {}
    with open_tensors(checkpoint.files, checkpoint.block_keys[index]) as slices:
        for key, stored in slices.items():
            linear = by_key.get(key)
            if linear is None:
                tensors[key] = stored[...]
                continue
            weight = linear.layout.matrix(stored[...])
            packed = pack_weight(weight, config.values, config.group_size, peak)
            parts = tensors_of(packed, key)
            tensors |= parts
            written[key] = PackedLinearRecord(
                name=linear.name,
                kind=linear.kind,
                block=index,
                shape=(linear.layout.rows, linear.layout.cols),
                nonzeros=packed.nonzeros,
                density=packed.density,
                dense_bytes=linear.dense_bytes,
                bytes=sum(part.nbytes for part in parts.values()),
                expert=linear.experts is not None,
            )
    # In the model's order; files sort by name.
    return tensors, [written[linear.key] for linear in linears]


def verify(
    checkpoint: Checkpoint,
    linears: list[PackedLinear],
    config: PackedConfig,
    path: Path,
    peak: int = 127,
) -> None:
    """Reads the packed linears of a shard back and compares them with their source.

    Args:
        peak: what int8 was made with, see `quantize_int8`.

    Raises:
        BesaError: the file does not hold what was written. It is removed.
    """
    with (
        safe_open(path, framework="pt") as file,
        open_tensors(checkpoint.files, [linear.key for linear in linears]) as slices,
    ):
        names = set(file.keys())

        def read(name: str) -> Tensor | None:
            return file.get_tensor(name) if name in names else None

        for linear in linears:
            weight = linear.layout.matrix(slices[linear.key][...])
            scale = steps = None
            if config.has_scale:
                weight, scale, steps = quantize(weight, config.values, config.group_size, peak)
            try:
                packed = packed_of(read, linear.key, linear.layout.cols, config)
                # -0.0, which comes back as +0.0, is equal to it.
                equal = torch.equal(packed.unpack_numbers(), weight)
                for found, expected in ((packed.scale, scale), (packed.steps, steps)):
                    if expected is not None:
                        equal = equal and found is not None and torch.equal(found, expected)
            except BesaError:
                equal = False
            if not equal:
                path.unlink()
                raise BesaError(
                    f"{path} does not hold what was written ({linear.name}): check the disk, "
                    "then run the same command again"
                )
