"""What the pages share: the templates' environment, the style, and the two widths of a chart.

>>> clean("a\\x00b")
'a\ufffdb'
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from besa.report import palette
from besa.report.figures import Record

WIDE, NARROW = 960.0, 328.0  # the text column of a desktop window and of a 360-pixel phone


@cache
def environment(autoescape: bool = True, folder: Path = Path(__file__).parent) -> Environment:
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def fill(template: str, values: Record, record: Record) -> str:
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    style += palette.rules(palette.LIGHT)
    style += f"@media screen and (prefers-color-scheme: dark){{{palette.rules(palette.DARK)}}}"
    version = record.get("besa_version") or record["versions"].get("besa", "")
    page = (
        environment().get_template(template).render(style=Markup(style), version=version, **values)
    )
    return clean(page)


def clean(page: str) -> str:
    """Without what no text file may hold: control characters and halves of surrogate pairs."""
    page = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", page)
    return page.encode("utf-8", "replace").decode()


def both(draw: Callable[[float], str]) -> dict[str, Markup | None]:
    """A chart for the desk and one for the phone; the style sheet shows the one that fits."""
    wide, narrow = draw(WIDE), draw(NARROW)
    return {"wide": Markup(wide), "narrow": Markup(narrow) if narrow != wide else None}
