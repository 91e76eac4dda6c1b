"""The README.md of a packed checkpoint: a Hugging Face model card, from the export's record.

>>> from pathlib import Path
>>> from besa.model.record import read_record
>>> print(packed_card(read_record(Path("path/to/sparse"))))
---
...
>>> pattern_in_words("2:4")
'2:4, at most 2 weights in every 4 neighbours along the inputs are kept'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from besa.kernels.abi import WHOLE
from besa.model.export_record import DenseLinear, PackedRecord
from besa.model.prune_record import PruneRecord
from besa.model.record import pruning_of
from besa.report.card import escape_markdown, versions_line, yaml_string
from besa.report.formatting import percent, rate, size
from besa.report.layout import environment, printable
from besa.report.names import hub_id, recipe_name, short_name


def packed_card(record: PackedRecord) -> str:
    """Markdown with YAML front matter. A local folder's path is not published, only its name."""
    pruning = pruning_of(record)
    model = record.model if pruning is None else pruning.model
    sizes, read = record.sizes, record.read_per_token
    card = (
        environment(autoescape=False, folder=Path(__file__).parent)
        .get_template("card.md.j2")
        .render(
            base_model=yaml_string(short_name(model)),
            public=hub_id(model),
            name=escape_markdown(short_name(model)),
            zeros=None if pruning is None else percent(pruning.sparsity.achieved),
            pruned=_how_it_was_pruned(pruning),
            linears=len(record.linears),
            values=escape_markdown(record.values),
            pattern=escape_markdown(pattern_in_words(record.pattern)),
            dense=size(sizes.dense_bytes),
            packed=size(sizes.bytes),
            ratio=f"{sizes.bytes / sizes.dense_bytes:.2f}×",
            linears_dense=size(sizes.linears_dense_bytes),
            linears_packed=size(sizes.linears_bytes),
            linears_ratio=f"{sizes.linears_bytes / sizes.linears_dense_bytes:.3f}×",
            read_dense=size(read.dense_bytes),
            read_packed=size(read.packed_bytes),
            speedup=f"{read.speedup:.2f}×",
            left=[escape_markdown(line) for line in left_dense(record.dense)],
            exactly="" if record.values in WHOLE else ", bit for bit",
            versions=versions_line(record.versions),
            version=escape_markdown(record.besa_version),
            loader=record.loader,
        )
    )
    return printable(card)


def pattern_in_words(pattern: str) -> str:
    """What a pattern means."""
    if pattern == "unstructured":
        return "unstructured, anywhere in a row"
    n, m = pattern.split(":")
    return f"{pattern}, at most {n} weights in every {m} neighbours along the inputs are kept"


def left_dense(linears: Sequence[DenseLinear]) -> list[str]:
    """Linears of the blocks that stay dense: one line for all of a kind and reason."""
    groups: dict[tuple[str, str], list[DenseLinear]] = {}
    for linear in linears:
        groups.setdefault((linear.kind, linear.reason), []).append(linear)
    lines = []
    for (kind, reason), members in groups.items():
        total = size(sum(linear.bytes for linear in members))
        first = members[0].name
        what = first if len(members) == 1 else f"{len(members)} × {kind}, as {first}"
        densities = [linear.density for linear in members if linear.density is not None]
        if densities:
            low, high = percent(1 - max(densities)), percent(1 - min(densities))
            reason += f", {low}" if low == high else f", {low} to {high}"
        lines.append(f"{what} ({total}): {reason}")
    return lines


def _how_it_was_pruned(record: PruneRecord | None) -> str:
    if record is None:
        return "A model with zeros in its weights."
    target = record.sparsity.target
    aim = "" if target is None else f" to {rate(target)}"
    method = escape_markdown(recipe_name(record.settings))
    return f"{escape_markdown(short_name(record.model))}, pruned{aim} with {method}."
