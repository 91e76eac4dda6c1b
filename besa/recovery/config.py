"""The settings of `besa recover`.

>>> RecoverConfig(out="recovered", teacher="path/to/model", samples=64).held_out
8
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from besa.data.beginning import CHOICES
from besa.data.held_out import HELD_OUT
from besa.data.settings import column_setting, separator_setting
from besa.errors import BesaError
from besa.settings import DTYPES, check_choices, described, setting, trust_remote_code_setting


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """The settings of a run, checked when they are made.

    Raises:
        BesaError: a setting that cannot be, by name.
    """

    teacher: str | Path = field(
        metadata=described("the dense model that it was pruned from", metavar="MODEL")
    )
    out: str | Path = field(metadata=described("output directory", metavar="DIR"))
    text: str = setting(
        "builtin",
        ".txt, .jsonl, .csv or .parquet file, data set id, or builtin (default: %(default)s)",
        metavar="TEXT",
    )
    column: str | None = column_setting()
    separator: str = separator_setting()
    samples: int = setting(512, "samples of the text (default: %(default)s)")
    seqlen: int | None = setting(None, "tokens in a sample (default: 2048, or the model's most)")
    bos: str = setting(
        "auto",
        "the beginning token before each sample: %(choices)s; auto: if the tokenizer puts one "
        "before a text (default: %(default)s)",
        choices=CHOICES,
    )
    epochs: int = setting(1, "passes over the samples (default: %(default)s)")
    batch_size: int = setting(
        1, "samples in a step; several processes share them (default: %(default)s)"
    )
    step: float | None = setting(
        None,
        "size of Adam's first step, as a share of a matrix's root mean square (default: 0.003, or "
        "0.001 or 0.0003 where that does harm)",
    )
    gradient_checkpointing: bool = setting(
        False, "compute a block's activations twice instead of keeping them: less memory, more time"
    )
    seed: int = setting(0, "(default: %(default)s)")
    device: str | None = setting(None, "cpu or cuda (default: the GPU if there is one)")
    dtype: str = setting(
        "auto",
        f"of the computation: {', '.join(DTYPES)}; the weights that are trained are float32 "
        "(default: %(default)s)",
        choices=DTYPES,
    )
    trust_remote_code: bool = trust_remote_code_setting()
    overwrite: bool = setting(False, "replace what is at --out")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("samples", "seqlen", "epochs", "batch_size", "step"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BesaError(f"{name} {value} is not positive")
        if self.samples < HELD_OUT:
            raise BesaError(
                f"of {self.samples} samples none can be held out to see what training is worth: "
                f"give --samples {HELD_OUT} or more"
            )
        if self.dtype == "float16":
            raise BesaError("dtype float16: its range is too small for gradients, use bfloat16")

    @property
    def sample_count(self) -> int:
        """How many samples of the text there are."""
        return self.samples

    @property
    def held_out(self) -> int:
        """How many of the samples nothing is learned from."""
        return self.samples // HELD_OUT


def check_accelerate() -> None:
    """Raises a BesaError if what transformers' Trainer needs is not there."""
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise BesaError(
            "training needs accelerate, as transformers' Trainer does: pip install 'besa[recover]'"
        )
