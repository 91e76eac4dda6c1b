"""The settings by which every command that reads a text has it read.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Example:
...     column: str | None = column_setting()
...     separator: str = separator_setting()
>>> Example()
Example(column=None, separator='auto')
"""

from __future__ import annotations

from typing import Any

from besa.data.texts import SEPARATORS
from besa.settings import setting


def column_setting(rows: str = "the text's rows") -> Any:
    """Which column of a text's rows is read, see `besa.data.texts`."""
    return setting(
        None,
        f"the column of {rows} (default: text, or else messages, which hold chats)",
        metavar="NAME",
    )


def separator_setting(text: str = "the text") -> Any:
    """What stands between the documents of a text, see `besa.data.stream`."""
    return setting(
        "auto",
        f"between documents: %(choices)s; auto: the end-of-sequence token where {text} has rows "
        "(default: %(default)s)",
        choices=SEPARATORS,
    )
