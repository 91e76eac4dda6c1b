"""The README.md of an ONNX export, from its record.

>>> from pathlib import Path
>>> from besa.model.record import read_record
>>> print(onnx_card(read_record(Path("path/to/onnx"))))
---
...
"""

from __future__ import annotations

import math
import platform
from pathlib import Path

from besa.export.onnx.runtime import NAME
from besa.export.onnx.sparse import SMALL
from besa.model.export_record import OnnxRecord
from besa.model.record import pruning_of
from besa.report.card import escape_markdown, versions_line, yaml_string
from besa.report.formatting import percent, size
from besa.report.layout import environment, printable
from besa.report.names import hub_id, short_name

_GRAPHS = {
    "genai": "with the fused operators of ONNX Runtime GenAI's model builder",
    "standard": "with operators of the ONNX standard alone",
}


def onnx_card(record: OnnxRecord) -> str:
    """Markdown with YAML front matter. A local folder's path is not published, only its name."""
    pruning = pruning_of(record)
    model = record.model if pruning is None else pruning.model
    check, packed = record.check, record.packed
    weights = sum(math.prod(product.shape) for product in packed)
    card = (
        environment(autoescape=False, folder=Path(__file__).parent)
        .get_template("card.md.j2")
        .render(
            base_model=yaml_string(short_name(model)),
            public=hub_id(model),
            name=escape_markdown(short_name(model)),
            zeros=None if pruning is None else percent(pruning.sparsity.achieved),
            graph=_GRAPHS[record.graph],
            graph_name=record.graph,
            precision=escape_markdown(record.precision),
            bytes=size(record.bytes),
            source_bytes=size(record.source_bytes),
            check=check is not None,
            error="" if check is None else f"{check.error:.1g}",
            agreement="" if check is None else percent(check.agreement, 0),
            tokens="" if check is None else check.tokens,
            sparse=record.sparse,
            packed=len(packed),
            packed_bytes=size(sum(product.bytes for product in packed)),
            cuda=record.device == "cuda",
            portable=weights <= SMALL and record.device == "cpu",
            library=NAME,
            machine=platform.machine(),
            pattern=record.pattern,
            versions=versions_line(record.versions),
            version=escape_markdown(record.besa_version),
        )
    )
    return printable(card)
