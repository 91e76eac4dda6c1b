"""The record of a comparison: one model pruned by several methods at several settings.

>>> comparison = read_comparison(Path("path/to/comparison.json"))
>>> {row.recipe: row.perplexity for row in comparison.rows if row.setting == "50%"}["Wanda"]
14.69...

`besa demo` and benchmarks/table.py make one (besa.demo.compare); besa.report.render_comparison
shows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from besa.report.formatting import in_windows
from besa.report.names import recipe_name
from besa.typed_json import ABSENT_IF_DEFAULT, from_json, to_json
from besa.writing import write_text


@dataclass(frozen=True, kw_only=True)
class DensePerplexity:
    """Of the model before it was pruned, with its standard error over the text's windows."""

    perplexity: float
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One pruned model.

    Attributes:
        method, update, granularity: how it was pruned; only BESA has a granularity.
        quantize: what its weights were rounded to.
        effort, rotate: None where they were the defaults.
        setting: what it was pruned to, "50%" or "2:4".
        perplexity, standard_error: over the text's windows.
        sparsity: the fraction of zeros over all of its weights.
        recovered: the share of Wanda's loss of perplexity over the dense model that is won back.
        recovered_nats: the same of the mean loss in nats.
        margin: by how many nats a token it beats Wanda on the same windows; `margin_se` is the
            paired standard error of that. These four are None of Wanda itself.
        seconds: what pruning took.
    """

    method: str
    update: str = field(default="none", metadata=ABSENT_IF_DEFAULT)
    granularity: str | None = None
    quantize: str | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    effort: str | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    rotate: str | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    setting: str
    perplexity: float
    standard_error: float | None = None
    sparsity: float | None = None
    recovered: float | None = None
    recovered_nats: float | None = None
    margin: float | None = None
    margin_se: float | None = None
    seconds: float = 0.0

    @property
    def recipe(self) -> str:
        """How it was pruned, for people."""
        name = recipe_name({"method": self.method, "update": self.update})
        more = {
            "rates by {}": self.granularity,
            "rounded to {}": self.quantize,
            "{} effort": self.effort,
            "rotation {}": self.rotate,
        }
        return ", ".join([name, *(words.format(x) for words, x in more.items() if x)])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All of them, beside the dense model, over `tokens` of `text` in windows of `seqlen`.

    Attributes:
        bos: whether each window began with the tokenizer's beginning token.
        settings: of pruning, that all runs shared, where they are not the defaults.
    """

    record_version: int = 1
    model: str
    text: str
    bos: bool = field(default=False, metadata=ABSENT_IF_DEFAULT)
    settings: dict[str, Any] = field(default_factory=dict)
    seqlen: int
    tokens: int
    dense: DensePerplexity
    rows: tuple[ComparedRun, ...]
    versions: dict[str, str]
    machine: str | None = None

    @property
    def windows(self) -> str:
        """How the text was read, for people."""
        return in_windows(self.seqlen, self.bos)


def read_comparison(path: Path) -> Comparison:
    """Reads what `write_comparison` wrote, in this version of besa or an earlier one.

    Raises:
        ShapeError: it is no comparison.
    """
    return from_json(Comparison, json.loads(path.read_text(encoding="utf-8")))


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Writes the comparison as JSON, whole or not at all."""
    write_text(json.dumps(to_json(comparison), indent=1) + "\n", path)
