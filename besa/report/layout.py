"""What the pages share: templates, style, the parts that templates draw, the widths of a chart.

>>> printable("a\\x00b")
'a\ufffdb'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from besa.report import palette

WIDE, NARROW = 960.0, 328.0  # the text column of a desktop window and of a 360-pixel phone


@dataclass(frozen=True)
class Headline:
    """A large figure at the top of a page; `key` marks the one that the page is about."""

    label: str
    value: str
    more: str = ""
    key: bool = False


@dataclass(frozen=True)
class Table:
    """A table: its first column names the rows."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A picture for the desk and one for the phone; the style sheet shows the one that fits.

    `narrow` is None where the wide one fits both.
    """

    wide: Markup
    narrow: Markup | None

    @classmethod
    def drawn(cls, draw: Callable[[float], str]) -> Chart:
        """Draws for both; `draw` makes an <svg> for a width in pixels."""
        wide, narrow = draw(WIDE), draw(NARROW)
        return cls(Markup(wide), Markup(narrow) if narrow != wide else None)


@cache
def environment(autoescape: bool = True, folder: Path = Path(__file__).parent) -> Environment:
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def render_page(template: str, values: Mapping[str, Any], version: str) -> str:
    """A self-contained page.

    Args:
        template: the name of a file beside this one.
        values: what it shows.
        version: of the besa that measured.
    """
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    style += palette.rules(palette.LIGHT)
    style += f"@media screen and (prefers-color-scheme: dark){{{palette.rules(palette.DARK)}}}"
    page = environment().get_template(template)
    return printable(page.render(style=Markup(style), version=version, **values))


def printable(page: str) -> str:
    """Without what no text file may hold: control characters and halves of surrogate pairs."""
    page = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", page)
    return page.encode("utf-8", "replace").decode()
