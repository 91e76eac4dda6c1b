"""The settings of a pruning run.

>>> PruneConfig(out="pruned", method="wanda", sparsity=0.6).rate
0.6
>>> PruneConfig(out="pruned", pattern="2:4").pattern
Pattern(n=2, m=4)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from besa.data.beginning import CHOICES
from besa.data.held_out import HELD_OUT
from besa.data.settings import column_setting, separator_setting
from besa.errors import BesaError
from besa.methods import METHODS, UPDATES
from besa.pruning.grid import Grid
from besa.settings import DTYPES, check_choices, described, setting, trust_remote_code_setting

GRANULARITIES = ("row", "layer")
TEACHERS = ("dense", "pruned")
EFFORTS = ("low", "medium", "high")
ROTATIONS = ("off", "auto", "on")

# Calibration samples where the user does not say how many; three times as many with high effort.
SAMPLES = 128


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be: anywhere (`m` = 0), or all but `n` of every `m` neighbours."""

    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """From "unstructured" or "N:M".

        Raises:
            BesaError: it is neither, or not 0 < N < M.
        """
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None:
            raise BesaError(f"pattern {text!r}: give `unstructured` or N:M, for example 2:4")
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise BesaError(f"pattern {text}: N of every M weights are kept, so 0 < N < M")
        return cls(n, m)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"{self.n}:{self.m}" if self.m else "unstructured"

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros that an N:M pattern fixes; None for unstructured."""
        return 1 - self.n / self.m if self.m else None


UNSTRUCTURED = Pattern()


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The settings of a run, checked when they are made.

    Attributes:
        pattern: may be given as its text, too: "2:4".
        quantize: likewise: "int4:64".
        dtype: weights are stored as they came, whatever they are computed in.

    Raises:
        BesaError: a setting that cannot be, by name.
    """

    out: str | Path = field(metadata=described("output directory", metavar="DIR"))
    method: str = setting("besa", "%(choices)s (default: %(default)s)", choices=tuple(METHODS))
    effort: str = setting(
        "medium",
        "how much time quality is worth: %(choices)s; low: BESA's masks, then ADMM; high: three "
        "times the samples, rotations, and then `besa recover` (default: %(default)s)",
        choices=EFFORTS,
    )
    rotate: str | None = setting(
        None,
        "rotations before pruning, which are learned and leave the function alone: %(choices)s; "
        "auto: where the model does not grow (default: off, with high effort auto)",
        choices=ROTATIONS,
    )
    update: str | None = setting(
        None,
        "what makes the weights that are kept make up for the others: %(choices)s (default: for "
        "BESA auto, with low effort admm; none for other methods)",
        choices=tuple(UPDATES),
    )
    teacher: str | None = setting(
        None,
        "what an updated block is to give again: its output in the dense model, or that of the "
        "dense block after the pruned ones: %(choices)s (default: dense with an update)",
        choices=TEACHERS,
    )
    sparsity: float | None = setting(None, "fraction of weights to prune (default: 0.5)")
    pattern: Pattern = setting(
        UNSTRUCTURED,
        "unstructured, or N:M: N of every M weights are kept (default: %(default)s)",
        parse=Pattern.parse,
    )
    quantize: Grid | None = setting(
        None,
        "round what is kept, too: int8 or int4, with `:GROUP` columns that share a scale, as "
        "int4:64 (default: a whole row)",
        metavar="TYPE",
        parse=Grid.parse,
    )
    granularity: str = setting(
        "row",
        "BESA learns a rate per row or per layer (default: %(default)s)",
        choices=GRANULARITIES,
    )
    calibration: str = setting(
        "builtin",
        ".txt, .jsonl, .csv or .parquet file, data set id, or builtin (default: %(default)s)",
        metavar="TEXT",
    )
    column: str | None = column_setting()
    separator: str = separator_setting()
    samples: int | None = setting(
        None, f"calibration samples (default: {SAMPLES}, with high effort {3 * SAMPLES})"
    )
    expert_tokens: int | None = setting(
        None,
        "add samples, up to three times as many, until each expert sees so many tokens "
        "(default: none are added)",
        metavar="N",
    )
    drop_experts: int | None = setting(
        None,
        "before pruning, leave out so many experts of each layer, those that carry least "
        "(default: none)",
        metavar="N",
    )
    seqlen: int | None = setting(None, "tokens in a sample (default: 2048, or the model's most)")
    bos: str = setting(
        "auto",
        "the beginning token before each sample: %(choices)s; auto: if the tokenizer puts one "
        "before a text (default: %(default)s)",
        choices=CHOICES,
    )
    step_samples: int | None = setting(
        None,
        "samples that a step of learning sees; several processes share them (default: as many as "
        "hold 512 tokens, at least one; of the training with high effort, one)",
        metavar="N",
    )
    epochs: int = setting(1, "BESA's passes over the samples (default: %(default)s)")
    seed: int = setting(0, "(default: %(default)s)")
    device: str | None = setting(None, "cpu, cuda, cuda:1 (default: the GPU if there is one)")
    dtype: str = setting(
        "auto",
        f"of the computation: {', '.join(DTYPES)} (default: %(default)s)",
        choices=DTYPES,
    )
    include: str | None = setting(None, "prune only linears so named", metavar="REGEX")
    exclude: str | None = setting(None, "leave linears so named dense", metavar="REGEX")
    activations: str = setting(
        "host",
        "keep the calibration stream in host memory or on disk (default: %(default)s)",
        choices=("host", "disk"),
    )
    trust_remote_code: bool = trust_remote_code_setting()
    overwrite: bool = setting(False, "replace what is at --out")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.update is None:
            guarded = "admm" if self.effort == "low" else "auto"
            object.__setattr__(self, "update", guarded if self.method == "besa" else "none")
        if self.teacher is None:
            object.__setattr__(self, "teacher", "pruned" if self.update == "none" else "dense")
        if self.rotate is None:
            object.__setattr__(self, "rotate", "auto" if self.effort == "high" else "off")
        if self.samples is None:
            object.__setattr__(self, "samples", SAMPLES * (3 if self.effort == "high" else 1))
        for name, parse in (("pattern", Pattern.parse), ("quantize", Grid.parse)):
            text = getattr(self, name)
            if isinstance(text, str):
                object.__setattr__(self, name, parse(text))
        fixed = self.pattern.sparsity
        if fixed is not None and self.sparsity not in (None, fixed):
            raise BesaError(
                f"sparsity {self.sparsity} contradicts the pattern {self.pattern}, which prunes "
                f"{fixed:g}: leave --sparsity out"
            )
        if not 0 < self.rate < 1:
            raise BesaError(f"sparsity {self.sparsity} is not between 0 and 1")
        for name in (
            "samples",
            "epochs",
            "step_samples",
            "seqlen",
            "expert_tokens",
            "drop_experts",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BesaError(f"{name} {value} is not positive")
        if self.update == "learn" and self.sample_count < HELD_OUT:
            raise BesaError(
                f"of {self.samples} samples none can be held out to choose the size of a step: "
                f"give --samples {HELD_OUT} or more"
            )
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise BesaError(f"{name} {getattr(self, name)!r}: {error}") from None

    @property
    def trains(self) -> bool:
        """Whether the pruned model is trained as a whole, which would undo a rounding."""
        return self.effort == "high" and self.quantize is None

    @property
    def sample_count(self) -> int:
        """How many calibration samples there are."""
        assert self.samples is not None  # since __post_init__
        return self.samples

    @property
    def rate(self) -> float:
        """The fraction of weights to prune."""
        fixed = self.pattern.sparsity
        if fixed is not None:
            return fixed
        return 0.5 if self.sparsity is None else self.sparsity
