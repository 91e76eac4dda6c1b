"""The rotated copy of a model that is pruned in its place, beside the output while it is needed.

>>> config = PruneConfig(out="pruned", rotate="on", samples=4, seqlen=32)
>>> copy = rotated_copy("path/to/model", config)
>>> copy.directory, copy.words
(PosixPath('pruned.rotated'), 'the residual stream and the values of each head were rotated')
>>> copy.remove()
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa.data.samples import draw_samples, samples_digest
from besa.errors import BesaError
from besa.model.checkpoint import Checkpoint
from besa.model.loading import fitting_in_memory, pick_device
from besa.progress import Event, Tell
from besa.pruning.config import PruneConfig
from besa.version import __version__
from besa.writing import write_text

# Samples that importance is measured on.
_SAMPLES = 32

# What the copy was made of; also the sign that it is besa's.
_MADE_OF = ".besa-rotation"  # hidden: it is not to be copied along


@dataclass(frozen=True)
class Rotated:
    """A rotated copy of a model: where it is, and what was rotated, in words."""

    directory: Path
    words: str

    def remove(self) -> None:
        """Removes the copy."""
        shutil.rmtree(self.directory)


def rotated_copy(
    model: str | Path, config: PruneConfig, tell: Tell = lambda event: None
) -> Rotated | None:
    """Makes the copy, or finds what an interrupted run left; None if nothing can be rotated.

    Raises:
        BesaError: the model does not fit into memory, or something else is in the copy's place.
    """
    # It brings the loading of whole models, which other runs are to be spared.
    from besa.rotation.rotate import rotate

    checkpoint = Checkpoint.open(model, config.trust_remote_code)
    windows = draw_samples(checkpoint, config.calibration, config)
    made_of = {
        "model": checkpoint.fingerprint(),
        "text": samples_digest(windows),
        "rotate": config.rotate,
        "besa": __version__,
    }
    out = Path(config.out)
    directory = out.with_name(out.name + ".rotated")
    if directory.exists():
        found = _made_of(directory)
        if found.items() >= made_of.items():
            return Rotated(directory, found["words"])
        if not found:
            raise BesaError(f"{directory} is in the way: remove it, or give another --out")
        shutil.rmtree(directory)

    def on_step(done: int, total: int) -> None:
        tell(Event("rotating", done, total, what="towards uneven weights"))

    def on_written(path: Path, words: str) -> None:
        write_text(json.dumps({**made_of, "words": words}), path / _MADE_OF)

    with fitting_in_memory("the whole model", "give --rotate off or --device cpu"):
        words = rotate(
            checkpoint,
            windows[:_SAMPLES],
            directory,
            device=pick_device(config.device),
            untie=config.rotate == "on",
            on_step=on_step,
            on_written=on_written,
        )
    return None if words is None else Rotated(directory, words)


def _made_of(directory: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((directory / _MADE_OF).read_text())
    except (OSError, ValueError):
        return {}
    return found
