"""What an export leaves in besa.json: sizes, densities, settings, versions, digests."""

from __future__ import annotations

import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from besa.export.packed.sizes import read_per_token
from besa.export.plan import Plan
from besa.formats import PackedConfig
from besa.formats.checkpoint import FORMAT_VERSION
from besa.model.checkpoint import Checkpoint
from besa.model.files import record_of
from besa.report.figures import short_names
from besa.version import __version__


def export_record(
    checkpoint: Checkpoint,
    plan: Plan,
    config: PackedConfig,
    settings: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    size: int,
    seconds: float,
) -> dict[str, Any]:
    """The record of a packed checkpoint.

    Args:
        shards: what was written, with its digest and its packed linears.
        size: bytes of all shards.
    """
    linears = [linear for shard in shards for linear in shard.get("linears", [])]
    kinds = list(
        dict.fromkeys(x["kind"] for x in linears) | dict.fromkeys(x.kind for x in plan.dense)
    )
    short = dict(zip(kinds, short_names(kinds), strict=True))
    return {
        "besa_version": __version__,
        "command": "export",
        "format": settings["format"],
        "format_version": FORMAT_VERSION,
        "model": settings["model"],
        "architecture": type(checkpoint.model).__name__,
        "settings": dict(settings),
        "versions": versions(),
        "values": config.values,
        "group_size": config.group_size,
        "pattern": config.pattern,
        "sizes": {
            "dense_bytes": checkpoint.nbytes,
            "bytes": size,
            "linears_dense_bytes": sum(linear["dense_bytes"] for linear in linears),
            "linears_bytes": sum(linear["bytes"] for linear in linears),
        },
        "read_per_token": read_per_token(checkpoint, linears),
        "linears": [{**linear, "kind": short[linear["kind"]]} for linear in linears],
        "dense": [{**asdict(linear), "kind": short[linear.kind]} for linear in plan.dense],
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "digests": {shard["file"]: shard["sha256"] for shard in shards},
        "source": record_of(checkpoint.directory),
    }


def versions() -> dict[str, str]:
    import safetensors
    import transformers

    return {
        "besa": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def peak_memory() -> int:
    """The most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
