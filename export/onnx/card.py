"""The README.md of an ONNX export, from its record.

onnx_card(json.loads(Path("onnx/besa.json").read_text()))
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from besa.export.onnx.runtime import NAME
from besa.export.onnx.sparse import SMALL
from besa.export.packed.card import pruning
from besa.report.card import words, yaml
from besa.report.figures import hub_id, percent, short_name, size
from besa.report.layout import clean, environment

_GRAPHS = {
    "genai": "with the fused operators of ONNX Runtime GenAI's model builder",
    "standard": "with operators of the ONNX standard alone",
}


def onnx_card(record: dict[str, Any]) -> str:
    """Markdown with YAML front matter. A local folder's path is not published, only its name."""
    model, source = str(record["model"]), pruning(record)
    if source is not None:
        model = str(source["model"])
    check, packed = record["check"], record["packed"]
    weights = sum(one["shape"][0] * one["shape"][1] for one in packed)
    card = (
        environment(autoescape=False, folder=Path(__file__).parent)
        .get_template("card.md.j2")
        .render(
            base_model=yaml(short_name(model)),
            public=hub_id(model),
            name=words(short_name(model)),
            zeros=None if source is None else percent(float(source["sparsity"]["achieved"])),
            graph=_GRAPHS[record["graph"]],
            graph_name=record["graph"],
            precision=words(record["precision"]),
            bytes=size(record["bytes"]),
            source_bytes=size(record["source_bytes"]),
            check=check is not None,
            error="" if check is None else f"{check['error']:.1g}",
            agreement="" if check is None else percent(check["agreement"], 0),
            tokens="" if check is None else check["tokens"],
            sparse=record["sparse"],
            packed=len(packed),
            packed_bytes=size(sum(one["bytes"] for one in packed)),
            portable=weights <= SMALL,
            library=NAME,
            machine=platform.machine(),
            pattern=record["pattern"],
            versions=", ".join(f"{words(k)} {words(v)}" for k, v in record["versions"].items()),
            version=words(record["besa_version"]),
        )
    )
    return clean(card)
