"""The record of a packed checkpoint, from the plan and what was written.

>>> from pathlib import Path
>>> from besa.model.record import read_record
>>> read_record(Path("path/to/sparse")).linears[0]
PackedLinearRecord(name='model.layers.0.self_attn.q_proj', kind='q_proj', ...)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from besa.export.packed.sizes import read_per_token
from besa.export.plan import PackingPlan
from besa.formats import PackedConfig
from besa.machine import peak_memory
from besa.model.checkpoint import Checkpoint
from besa.model.export_record import PackedLinearRecord, PackedRecord, PackedSizes
from besa.model.record import read_raw_record
from besa.report.names import short_names
from besa.typed_json import from_json
from besa.version import __version__, versions


def packed_record(
    checkpoint: Checkpoint,
    plan: PackingPlan,
    config: PackedConfig,
    settings: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    size: int,
    seconds: float,
) -> PackedRecord:
    """The record of a packed checkpoint.

    Args:
        checkpoint: what was packed.
        shards: what was written, each with its digest and its packed linears' records.
        size: bytes of all shards.
    """
    linears = [
        from_json(PackedLinearRecord, linear)
        for shard in shards
        for linear in shard.get("linears", [])
    ]
    kinds = list(dict.fromkeys([*(x.kind for x in linears), *(x.kind for x in plan.dense)]))
    short = dict(zip(kinds, short_names(kinds), strict=True))
    return PackedRecord(
        besa_version=__version__,
        model=settings["model"],
        architecture=type(checkpoint.model).__name__,
        loader=checkpoint.loader,
        settings=dict(settings),
        versions=versions(),
        seconds=round(seconds, 3),
        peak_memory_bytes=peak_memory(),
        digests={shard["file"]: shard["sha256"] for shard in shards},
        format=settings["format"],
        source=read_raw_record(checkpoint.directory),
        format_version=config.format_version,
        values=config.values,
        group_size=config.group_size,
        pattern=config.pattern,
        sizes=PackedSizes(
            dense_bytes=checkpoint.nbytes,
            bytes=size,
            linears_dense_bytes=sum(linear.dense_bytes for linear in linears),
            linears_bytes=sum(linear.bytes for linear in linears),
        ),
        read_per_token=read_per_token(checkpoint, linears),
        linears=tuple(replace(linear, kind=short[linear.kind]) for linear in linears),
        dense=tuple(replace(linear, kind=short[linear.kind]) for linear in plan.dense),
    )
