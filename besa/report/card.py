"""The README.md of a pruned checkpoint: a Hugging Face model card, from the run's record.

>>> from pathlib import Path
>>> from besa.model.record import read_record
>>> print(model_card(read_record(Path("path/to/pruned"))))
---
...
>>> escape_markdown("a_b\\n<c>")
'a\\\\_b &lt;c&gt;'
"""

from __future__ import annotations

import html
import json
import re

from besa.model.prune_record import PruneRecord
from besa.report.figures import command, public, sparsity_in_words, summarise, unrouted
from besa.report.formatting import duration, percent, rate, signed, significant, size
from besa.report.layout import environment, printable
from besa.report.names import hub_id, short_name
from besa.report.page import setting_in_words


def model_card(record: PruneRecord) -> str:
    """Markdown with YAML front matter. A local folder's path is not published, only its name."""
    summary = summarise(record)
    settings = {k: v for k, v in public(record).settings.items() if k not in ("model", "out")}
    notes = [escape_markdown(note) for note in record.notes]
    without = unrouted(record.blocks)
    if without:
        notes.append(
            f"Some experts saw no calibration token ({len(without)} linears, see report.html)."
        )
    card = (
        environment(autoescape=False)
        .get_template("card.md.j2")
        .render(
            base_model=yaml_string(short_name(record.model)),
            public=hub_id(record.model),
            name=escape_markdown(short_name(record.model)),
            summary=summary,
            kind=sparsity_in_words(record),
            rotated=record.rotation,
            target=rate(summary.target),
            achieved=percent(summary.achieved, 2),
            zeros=f"{summary.zeros:,}",
            weights=f"{summary.weights:,}",
            blocks=len(record.blocks),
            change=None if summary.change is None else signed(summary.change),
            error=significant(summary.error),
            error_wanda=significant(summary.error_wanda),
            time=duration(record.seconds),
            memory=size(record.peak_memory_bytes),
            device=escape_markdown(record.device),
            dtype=escape_markdown(record.dtype),
            settings=[
                (escape_markdown(key), escape_markdown(setting_in_words(value)))
                for key, value in settings.items()
                if value is not None
            ],
            versions=versions_line(record.versions),
            command=fenced(command(public(record))),
            notes=notes,
            version=escape_markdown(record.besa_version),
            loader=record.loader,
        )
    )
    return printable(card)


def yaml_string(value: str) -> str:
    """A JSON string is a YAML string, whatever is in it."""
    return json.dumps(value)


def escape_markdown(value: str) -> str:
    """On one line, and as plain text to Markdown and HTML alike."""
    flat = html.escape(re.sub(r"\s+", " ", value), quote=False)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", flat)


def versions_line(versions: dict[str, str]) -> str:
    """`besa 0.1.0, python 3.11.7`, for Markdown."""
    return ", ".join(f"{escape_markdown(k)} {escape_markdown(v)}" for k, v in versions.items())


def fenced(line: str) -> str:
    """Inside a fenced block only a fence can end it: a line break or three backticks in a row."""
    return re.sub(r"[\r\n]+", " ", line).replace("```", "` ` `")
