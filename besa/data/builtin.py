"""The built-in corpus: the English and Python text that every CPython brings.

Where no model hub or data set can be reached there is still a Python: the language reference
in `pydoc_data.topics` (each topic is a document) and the standard library's sources with their
docstrings (each file is a document). A document belongs to one split, by a hash of its name, so
that the splits stay apart whichever Python runs.

>>> next(documents("calibration"))
'...'

The shipped model saw only `train`. Calibrate on `calibration`, choose on `validation`, and quote
`test`.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "calibration", "validation", "test")

# Percent of the documents, by hash of the name; the rest is `train`.
_HELD_OUT = {"calibration": 6, "validation": 6, "test": 6}

# Generated tables, copies of other modules, and what only some distributions carry.
_SKIPPED = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "lib2to3",
    "pydoc_data",
    "site-packages",
}


def split_of(name: str) -> str:
    """The split that a document belongs to, from its name alone."""
    point = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    for split, percent in _HELD_OUT.items():
        if point < percent:
            return split
        point -= percent
    return "train"


def named_documents() -> Iterator[tuple[str, str]]:
    """All documents as (name, text), in the order of their names."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"topics/{topic}", topics[topic]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if _SKIPPED.intersection(name.parts) or {"test", "tests"}.intersection(name.parts):
            continue
        try:
            yield name.as_posix(), path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a source in another encoding, a dangling link
            continue


def documents(split: str) -> Iterator[str]:
    """The documents of one split, in the order of their names.

    Raises:
        ValueError: if `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"no split named {split!r}: choose one of {', '.join(SPLITS)}")
    return (text for name, text in named_documents() if split_of(name) == split)
