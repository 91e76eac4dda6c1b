"""The settings of a pruning run.

config = PruneConfig(out="pruned", method="besa", sparsity=0.6)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from besa.errors import BesaError

METHODS = ("besa", "wanda", "sparsegpt", "magnitude")
GRANULARITIES = ("row", "layer")
DTYPES = ("auto", "float32", "bfloat16", "float16")


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


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The settings of a run, checked when they are made.

    Attributes:
        out: the output directory; it must not exist, be empty, or be overwritten.
        method: "besa", "wanda", "sparsegpt" or "magnitude".
        sparsity: the fraction of weights to prune; 0.5 unless the pattern fixes it.
        pattern: a `Pattern`, or its text, which is parsed: "unstructured", or "N:M": N of every
            M neighbours are kept.
        granularity: BESA learns a rate per "row" or per "layer" (linear).
        calibration: a .txt, .jsonl or .parquet file, a data set's id, or "builtin".
        samples: calibration samples.
        seqlen: tokens in a sample; by default 2048, or what the model can take.
        epochs: BESA's passes over the samples.
        seed: chooses and orders the samples.
        device: "cpu", "cuda", "cuda:1"; by default the GPU if there is one.
        dtype: of the computation: "float32", "bfloat16", "float16", or "auto": float32 on a CPU,
            the weights' own on a GPU. Weights are stored as they came.
        include: prune only linears whose full name this regular expression finds.
        exclude: leave linears dense whose full name this regular expression finds.
        activations: keep the calibration stream in "host" memory or on "disk".
        overwrite: replace what is at `out`.

    Raises:
        BesaError: a setting that cannot be, by name.
    """

    out: str | Path
    method: str = "besa"
    sparsity: float | None = None
    pattern: Pattern = Pattern()
    granularity: str = "row"
    calibration: str = "builtin"
    samples: int = 128
    seqlen: int | None = None
    epochs: int = 1
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    include: str | None = None
    exclude: str | None = None
    activations: str = "host"
    overwrite: bool = False

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("activations", self.activations, ("host", "disk"))
        if isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", Pattern.parse(self.pattern))
        fixed = self.pattern.sparsity
        if fixed is not None and self.sparsity not in (None, fixed):
            raise BesaError(
                f"sparsity {self.sparsity} contradicts the pattern {self.pattern}, which prunes "
                f"{fixed:g}: leave --sparsity out"
            )
        if not 0 < self.rate < 1:
            raise BesaError(f"sparsity {self.sparsity} is not between 0 and 1")
        for name in ("samples", "epochs", "seqlen"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BesaError(f"{name} {value} is not positive")
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise BesaError(f"{name} {getattr(self, name)!r}: {error}") from None

    @property
    def rate(self) -> float:
        """The fraction of weights to prune."""
        fixed = self.pattern.sparsity
        if fixed is not None:
            return fixed
        return 0.5 if self.sparsity is None else self.sparsity


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise BesaError(f"{name} {value!r}: choose one of {', '.join(choices)}")
