"""The README.md of a packed checkpoint: a Hugging Face model card, from the export's record.

import json, pathlib
from besa.export.packed.card import packed_card

record = json.loads(pathlib.Path("sparse/besa.json").read_text())
pathlib.Path("sparse/README.md").write_text(packed_card(record), encoding="utf-8")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from besa.report.card import words, yaml
from besa.report.figures import hub_id, method_name, percent, rate, short_name, size
from besa.report.layout import clean, environment


def packed_card(record: dict[str, Any]) -> str:
    """Markdown with YAML front matter. A local folder's path is not published, only its name."""
    model, source = str(record["model"]), pruning(record)
    if source is not None:
        model = str(source["model"])
    sizes, read = record["sizes"], record["read_per_token"]
    ratio = sizes["bytes"] / sizes["dense_bytes"]
    linears_ratio = sizes["linears_bytes"] / sizes["linears_dense_bytes"]
    card = (
        environment(autoescape=False, folder=Path(__file__).parent)
        .get_template("card.md.j2")
        .render(
            base_model=yaml(short_name(model)),
            public=hub_id(model),
            name=words(short_name(model)),
            zeros=None if source is None else percent(float(source["sparsity"]["achieved"])),
            pruned=_pruned(source),
            linears=len(record["linears"]),
            values=words(record["values"]),
            pattern=words(described(record["pattern"])),
            dense=size(sizes["dense_bytes"]),
            packed=size(sizes["bytes"]),
            ratio=f"{ratio:.2f}×",
            linears_dense=size(sizes["linears_dense_bytes"]),
            linears_packed=size(sizes["linears_bytes"]),
            linears_ratio=f"{linears_ratio:.3f}×",
            read_dense=size(read["dense_bytes"]),
            read_packed=size(read["packed_bytes"]),
            speedup=f"{read['speedup']:.2f}×",
            left=[words(line) for line in left_dense(record)],
            exactly="" if record["values"] == "int8" else ", bit for bit",
            versions=", ".join(f"{words(k)} {words(v)}" for k, v in record["versions"].items()),
            version=words(record["besa_version"]),
        )
    )
    return clean(card)


def pruning(record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of `besa prune` in an export's, if besa pruned the model."""
    kinds = {"model": str, "sparsity": dict, "settings": dict}
    source = record.get("source")
    while isinstance(source, dict):  # a model may have been unpacked before it was packed again
        known = all(isinstance(source.get(key), kind) for key, kind in kinds.items())
        if known and "achieved" in source["sparsity"]:
            return source
        source = source.get("source")
    return None


def described(pattern: str) -> str:
    """What a pattern means."""
    if pattern == "unstructured":
        return "unstructured, anywhere in a row"
    n, m = pattern.split(":")
    return f"{pattern}, at most {n} weights in every {m} neighbours along the inputs are kept"


def left_dense(record: dict[str, Any]) -> list[str]:
    """Linears of the blocks that stay dense: one line for all of a kind and reason."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for linear in record["dense"]:
        groups.setdefault((linear["kind"], linear["reason"]), []).append(linear)
    lines = []
    for (kind, reason), members in groups.items():
        total = size(sum(linear["bytes"] for linear in members))
        first = members[0]["name"]
        what = first if len(members) == 1 else f"{len(members)} × {kind}, as {first}"
        densities = [linear["density"] for linear in members if linear["density"] is not None]
        if densities:
            low, high = percent(1 - max(densities)), percent(1 - min(densities))
            reason += f", {low}" if low == high else f", {low} to {high}"
        lines.append(f"{what} ({total}): {reason}")
    return lines


def _pruned(source: dict[str, Any] | None) -> str:
    if source is None:
        return "A model with zeros in its weights."
    method = method_name(source["settings"].get("method"))
    target = source["sparsity"].get("target")
    aim = f" to {rate(float(target))}" if isinstance(target, int | float) else ""
    return f"{words(short_name(source['model']))}, pruned{aim} with {words(method)}."
