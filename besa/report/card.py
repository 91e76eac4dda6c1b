"""The README.md of a pruned checkpoint: a Hugging Face model card, from the run's record.

import json, pathlib
from besa.report.card import model_card

record = json.loads(pathlib.Path("pruned/besa.json").read_text())
pathlib.Path("pruned/README.md").write_text(model_card(record), encoding="utf-8")
"""

from __future__ import annotations

import html
import json
import re
from typing import Any

from besa.report.figures import (
    Record,
    command,
    duration,
    hub_id,
    percent,
    public,
    rate,
    short_name,
    signed,
    size,
    small,
    summarise,
    unrouted,
)
from besa.report.layout import clean, environment
from besa.report.page import describe, plain


def model_card(record: Record) -> str:
    """Markdown with YAML front matter. A local folder's path is not published, only its name."""
    model = str(record["model"])
    summary = summarise(record)
    settings = {k: v for k, v in public(record)["settings"].items() if k not in ("model", "out")}
    notes = [words(note) for note in record.get("notes") or []]
    without = unrouted(record["blocks"])
    if without:
        notes.append(
            f"Some experts saw no calibration token ({len(without)} linears, see report.html)."
        )
    card = (
        environment(autoescape=False)
        .get_template("card.md.j2")
        .render(
            base_model=yaml(short_name(model)),
            public=hub_id(model),
            name=words(short_name(model)),
            summary=summary,
            kind=describe(record),
            target=rate(summary.target),
            achieved=percent(summary.achieved, 2),
            zeros=f"{summary.zeros:,}",
            weights=f"{summary.weights:,}",
            blocks=len(record["blocks"]),
            change=None if summary.change is None else signed(summary.change),
            error=small(summary.error),
            error_wanda=small(summary.error_wanda),
            time=duration(record["seconds"]),
            memory=size(record.get("peak_memory_bytes")),
            device=words(record["device"]),
            dtype=words(record["dtype"]),
            settings=[(words(k), words(plain(v))) for k, v in settings.items() if v is not None],
            versions=", ".join(f"{words(k)} {words(v)}" for k, v in record["versions"].items()),
            command=code(command(public(record))),
            notes=notes,
            version=words(record.get("besa_version", "")),
        )
    )
    return clean(card)


def yaml(value: Any) -> str:
    """A JSON string is a YAML string, whatever is in it."""
    return json.dumps(str(value))


def words(value: Any) -> str:
    """On one line, and as plain words to Markdown and HTML alike."""
    flat = html.escape(re.sub(r"\s+", " ", str(value)), quote=False)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", flat)


def code(words: str) -> str:
    """Inside a fenced block only a fence can end it: a line break or three backticks in a row."""
    return re.sub(r"[\r\n]+", " ", words).replace("```", "` ` `")
