"""A changed copy of a model that is pruned in its place, beside the output while it is needed.

>>> directory, made_of = Path("pruned.rotated"), {"model": "sha", "rotate": "on"}
>>> directory.mkdir()
>>> sign(directory, made_of, "the values of each head were rotated")
>>> left_copy(directory, made_of).words  # of an interrupted run
'the values of each head were rotated'
>>> left_copy(directory, {**made_of, "rotate": "auto"}) is None, directory.exists()
(True, False)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from besa.errors import BesaError
from besa.writing import write_text

# What a copy was made of; also the sign that it is besa's. Hidden: it is not to be copied along.
_SIGN = ".besa-copy"


@dataclass(frozen=True)
class ModelCopy:
    """Where a copy is and what was changed, in words.

    Attributes:
        dropped: the experts that are gone, by the names of their modules.
    """

    directory: Path
    words: str
    dropped: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def remove(self) -> None:
        """Removes the copy."""
        shutil.rmtree(self.directory)


def left_copy(directory: Path, made_of: Mapping[str, Any]) -> ModelCopy | None:
    """The copy that an interrupted run left, if it was made of the same; any other is removed.

    Raises:
        BesaError: what is there is not besa's.
    """
    if not directory.exists():
        return None
    try:
        found: dict[str, Any] = json.loads((directory / _SIGN).read_text())
    except (OSError, ValueError):
        raise BesaError(f"{directory} is in the way: remove it, or give another --out") from None
    if found["made_of"] != made_of:
        shutil.rmtree(directory)
        return None
    dropped = {name: tuple(experts) for name, experts in found["dropped"].items()}
    return ModelCopy(directory, found["words"], dropped)


def sign(
    directory: Path,
    made_of: Mapping[str, Any],
    words: str,
    dropped: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Notes beside a copy what it is, for `left_copy`."""
    note = {"made_of": made_of, "words": words, "dropped": dropped or {}}
    write_text(json.dumps(note), directory / _SIGN)
