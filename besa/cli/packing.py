"""What `besa export` prints: sizes, densities, what stays dense, how a graph compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from besa.cli.tables import show
from besa.export.packed.card import left_dense, pattern_in_words
from besa.kernels.abi import WHOLE
from besa.model.export_record import (
    ExportRecord,
    OnnxRecord,
    PackedLinearRecord,
    PackedRecord,
    UnpackedRecord,
)
from besa.report.formatting import percent, size

# Of graphs for GPUs, what has not been run there: of dense and of sparse ones.
_UNTESTED = (
    "ONNX Runtime's CUDA provider has not run it",
    "its kernels ran on one outside ONNX Runtime, the graph on none; logits not compared",
)


def print_export(out: Path, record: ExportRecord, verbose: bool) -> None:
    """Prints what an export came to; with `verbose`, every packed linear."""
    if isinstance(record, PackedRecord):
        _print_packed(out, record, verbose)
    elif isinstance(record, UnpackedRecord):
        _print_unpacked(out, record)
    elif isinstance(record, OnnxRecord):
        _print_graph(out, record)


def _print_packed(out: Path, record: PackedRecord, verbose: bool) -> None:
    sizes, read, linears = record.sizes, record.read_per_token, record.linears
    values = record.values
    if values in WHOLE:
        group = record.group_size
        values += f" with a scale per {f'{group} columns' if group else 'row'}"
    pattern = pattern_in_words(record.pattern)
    print(f"{out}: {len(linears)} linears packed as {values}; {pattern}\n")
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("", "dense", "packed", ""):
        table.add_column(head, justify="right" if head else "left")
    rows = (
        ("weight files", sizes.dense_bytes, sizes.bytes),
        ("packed linears", sizes.linears_dense_bytes, sizes.linears_bytes),
        ("read per token", read.dense_bytes, read.packed_bytes),
    )
    for name, dense, packed in rows:
        table.add_row(name, size(dense), size(packed), f"{packed / dense:.3f}×")
    show(table)
    show(_densities(linears))
    if verbose:
        show(_every_linear(linears))
    for line in left_dense(record.dense):
        print(f"stays dense: {line}")
    print(
        f"Expected decoding at batch 1: {read.speedup:.2f}× as fast, from bytes read; "
        "`besa bench` measures it."
    )


def _print_unpacked(out: Path, record: UnpackedRecord) -> None:
    sizes = record.sizes
    print(
        f"{out}: {record.unpacked} linears unpacked, "
        f"{size(sizes.packed_bytes)} to {size(sizes.bytes)}"
    )


def _print_graph(out: Path, record: OnnxRecord) -> None:
    kind = "sparse" if record.sparse else "dense"
    device = " for cuda" if record.device == "cuda" else ""
    print(
        f"{out}: a {kind} graph ({record.graph}){device}, {record.precision}, "
        f"{size(record.bytes)} of weights; the checkpoint has {size(record.source_bytes)}"
    )
    if packed := record.packed:
        sparse = sum(product.sparse for product in packed)
        total = size(sum(product.bytes for product in packed))
        print(f"{len(packed)} products on packed weights, {sparse} of them pruned: {total}")
    if check := record.check:
        print(
            f"logits {check.error:.1g} (relative) off transformers' in {check.dtype}, the "
            f"same likeliest token for {percent(check.agreement, 0)} of {check.tokens}"
        )
    elif not device or not record.sparse:
        print("logits not compared: this CPU has no kernel for one of the operators")
    if device:
        print(f"untested on GPUs: {_UNTESTED[record.sparse]}")


def _densities(linears: Sequence[PackedLinearRecord]) -> Table:
    """How much is kept of each kind of linear, over the blocks."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("density")
    for head in ("linears", "min", "mean", "max", "bytes"):
        table.add_column(head, justify="right")
    kinds: dict[str, list[PackedLinearRecord]] = {}
    for linear in linears:
        kinds.setdefault(linear.kind, []).append(linear)
    for kind, members in kinds.items():
        densities = [linear.density for linear in members]
        weights = sum(linear.shape[0] * linear.shape[1] for linear in members)
        mean = sum(linear.nonzeros for linear in members) / weights
        share = _ratio(members)
        table.add_row(
            kind,
            str(len(members)),
            f"{min(densities):.4f}",
            f"{mean:.4f}",
            f"{max(densities):.4f}",
            share,
        )
    return table


def _every_linear(linears: Sequence[PackedLinearRecord]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("linear")
    for head in ("shape", "nonzeros", "density", "bytes"):
        table.add_column(head, justify="right")
    for linear in linears:
        table.add_row(
            linear.name,
            "×".join(map(str, linear.shape)),
            f"{linear.nonzeros:,}",
            f"{linear.density:.4f}",
            _ratio([linear]),
        )
    return table


def _ratio(linears: Sequence[PackedLinearRecord]) -> str:
    """Packed over dense bytes."""
    dense = sum(linear.dense_bytes for linear in linears)
    return f"{sum(linear.bytes for linear in linears) / dense:.3f}×"
