"""Writes files whole or not at all, and says in one line why not.

>>> write_text("<p>whole</p>", Path("page.html"))
>>> write_text("<p>whole</p>", Path("nowhere/page.html"))
Traceback (most recent call last):
besa.errors.BesaError: could not write nowhere/page.html: ...
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from besa.errors import BesaError


def write_text(text: str, path: Path) -> None:
    """Writes a text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` once all of it is on the disk.

    Raises:
        BesaError: it could not be written. Nothing is left of the file.
    """
    partial = path.with_name(path.name + ".writing")
    try:
        with writing(path):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while `path` is written, a full disk above all, into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BesaError(
                f"the disk is full: could not write {path}; make room and run the same command "
                "again, it goes on from the last finished block"
            ) from None
        raise BesaError(f"could not write {path}: {error.strerror or error}") from None


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
