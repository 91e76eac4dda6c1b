"""Rows of a file of JSON lines, CSV or Parquet: of each the text or the chat in one column.

>>> from pathlib import Path
>>> _ = Path("rows.csv").write_text("text,kind\\nHello,greeting\\n")
>>> list(csv_rows(Path("rows.csv"))), list(csv_rows(Path("rows.csv"), "kind"))
(['Hello'], ['greeting'])

A chat is a list of messages, each an object with a role and a content. A byte that is no UTF-8
comes as a lone surrogate, like the one half of a pair that JSON may spell out: `besa.data.stream`
replaces both, and counts them.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from besa.errors import BesaError, one_line

# What a row gives: a text, or the messages of a chat.
Document = str | list[dict[str, Any]]

# The columns that are read where none is named, the first that is there.
COLUMNS = ("text", "messages")

# A file with more than this share of broken bytes in its first ones has another encoding.
_MOST_BROKEN = 0.1
_FIRST_BYTES = 1 << 16


def column_of(names: Collection[str], asked: str | None) -> str | None:
    """The column to read of those that are there; None if it is not there."""
    return next((name for name in ([asked] if asked else COLUMNS) if name in names), None)


def document_of(value: Any) -> Document | None:
    """A cell as a document, an empty one as an empty text; None if it is neither text nor chat."""
    if value is None or value == []:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return value
    is_chat = isinstance(value, list) and all(
        isinstance(message, dict) and "role" in message for message in value
    )
    return value if is_chat and value else None


def plain_text(path: Path) -> Iterator[str]:
    """A text file is one document."""
    with _reading(path) as file:
        yield file.read()


def json_rows(path: Path, column: str | None = None) -> Iterator[Document]:
    """An object a line."""
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise BesaError(f"{path}, line {number}: not JSON, one object a line") from None
            names: Mapping[str, Any] = row if isinstance(row, dict) else {}
            name = column_of(names, column)
            found = None if name is None else document_of(names[name])
            if found is None:
                others = f", only {', '.join(names)}: name another by --column" if names else ""
                raise BesaError(
                    f"{path}, line {number}: no field `{column or name or COLUMNS[0]}` that holds "
                    f"a string or a chat{others}"
                )
            yield found


def csv_rows(path: Path, column: str | None = None) -> Iterator[Document]:
    """A row a record, after a first row with the columns' names."""
    csv.field_size_limit(sys.maxsize)  # a document is larger than its default
    with _reading(path, newline="") as file:  # a quoted cell may hold lines
        rows = csv.DictReader(file)
        try:
            name = _present(path, rows.fieldnames or (), column)
            for row in rows:
                yield row[name] or ""
        except csv.Error:
            raise BesaError(f"{path}, line {rows.line_num}: not CSV") from None


def parquet_rows(path: Path, column: str | None = None) -> Iterator[Document]:
    """A row of the table each."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BesaError(f"{path}: Parquet needs pyarrow: pip install 'besa[eval]'") from None
    with one_line(f"{path} cannot be read as Parquet"):
        file = parquet.ParquetFile(path)
        name = _present(path, file.schema_arrow.names, column)
        for batch in file.iter_batches(columns=[name]):
            cells = batch.column(name)
            if pyarrow.types.is_string(cells.type) or pyarrow.types.is_large_string(cells.type):
                cells = cells.cast(pyarrow.large_binary())  # which may hold what is no UTF-8
            for value in cells.to_pylist():
                found = document_of(value)
                if found is None:
                    raise BesaError(f"{path}: the column `{name}` does not hold strings or chats")
                yield found


def _present(path: Path, names: Collection[str], column: str | None) -> str:
    name = column_of(names, column)
    if name is None:
        raise BesaError(
            f"{path} has no column `{column or COLUMNS[0]}`, only {', '.join(names)}: name another "
            "by --column"
        )
    return name


@contextmanager
def _reading(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a UTF-8 file (a byte-order mark is dropped) and turns its failures into one line."""
    try:
        with path.open("rb") as raw:
            head = raw.read(_FIRST_BYTES).decode("utf-8", "surrogateescape")
        broken = sum(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in head)
        if broken > _MOST_BROKEN * len(head):
            raise BesaError(f"{path} is not UTF-8: convert it first")
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            yield file
    except OSError as error:
        raise BesaError(f"{path} cannot be read: {error.strerror}") from None
