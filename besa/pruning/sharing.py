"""How processes share the steps of learning of a pruning run, and whether they can.

>>> from besa.processes.ranks import ALONE
>>> check_shareable(PruneConfig(out="pruned", effort="high"), ALONE)  # one process shares nothing
"""

from __future__ import annotations

import warnings

from besa.errors import BesaError, BesaWarning
from besa.processes.ranks import Ranks
from besa.pruning import methods
from besa.pruning.batches import windows_at_once
from besa.pruning.config import PruneConfig


def check_shareable(config: PruneConfig, ranks: Ranks) -> None:
    """Raises a BesaError if a step of the training with high effort cannot be dealt out evenly."""
    step = config.step_samples or 1
    if config.trains and step % ranks.size:
        raise BesaError(
            f"--effort high trains the pruned model as a whole, in steps of {step} "
            f"sample{'s' * (step > 1)}, which {ranks.size} processes cannot share: give "
            f"--step-samples {ranks.evened(step)}"
        )


def warn_of_idle(config: PruneConfig, tokens: int, ranks: Ranks) -> None:
    """Says so where a step of learning has too few samples for all processes.

    Args:
        tokens: in a sample.
    """
    learns = methods.load(config.method).targets or config.update in ("auto", "learn")
    step = config.step_samples or windows_at_once(tokens)
    if not learns or step % ranks.size == 0:
        return
    warnings.warn(
        f"{ranks.size} processes share steps of {step} sample{'s' * (step > 1)}, so that some wait "
        f"while masks and weights are learned: --step-samples {ranks.evened(step)} keeps all at "
        "work, and learns in fewer steps",
        BesaWarning,
        stacklevel=2,
    )
