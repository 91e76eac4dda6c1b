"""The rotated copy of a model that is pruned in its place (`--rotate`).

>>> config = PruneConfig(out="pruned", rotate="on", samples=4, seqlen=32)
>>> copy = rotated_copy("path/to/model", config)
>>> copy.directory, copy.words
(PosixPath('pruned.rotated'), 'the residual stream and the values of each head were rotated')
>>> copy.remove()
"""

from __future__ import annotations

from pathlib import Path

from besa.data.samples import draw_samples, samples_digest
from besa.model.checkpoint import Checkpoint
from besa.model.loading import fitting_in_memory, pick_device
from besa.progress import Event, Tell
from besa.pruning.config import PruneConfig
from besa.pruning.model_copy import ModelCopy, left_copy, sign
from besa.version import __version__

# Samples that importance is measured on.
_SAMPLES = 32


def rotated_copy(
    model: str | Path, config: PruneConfig, tell: Tell = lambda event: None
) -> ModelCopy | None:
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
    if (left := left_copy(directory, made_of)) is not None:
        return left

    def on_step(done: int, total: int) -> None:
        tell(Event("rotating", done, total, what="towards uneven weights"))

    def on_written(path: Path, words: str) -> None:
        sign(path, made_of, words)

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
    return None if words is None else ModelCopy(directory, words)
