"""Prunes one model by several methods at several settings and compares what is left.

>>> methods = [Contender("wanda"), Contender("magnitude")]
>>> found = compare(
...     Path("path/to/model"), Path("demo"), {"2:4": SETTINGS["2:4"]}, methods, seqlen=32, limit=8
... )
>>> [(row.method, row.setting, row.recovered is None) for row in found.rows]
[('wanda', '2:4', True), ('magnitude', '2:4', False)]
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from besa.demo import MODEL
from besa.evaluation.config import EvalConfig
from besa.evaluation.evaluate import Result, evaluate
from besa.evaluation.perplexity import paired
from besa.machine import machine
from besa.model.prune_record import PruneRecord
from besa.model.record import read_record
from besa.progress import Event, Tell
from besa.pruning.config import PruneConfig
from besa.pruning.run import prune
from besa.report.comparison import ComparedRun, Comparison, DensePerplexity
from besa.version import __version__

# The name of a setting and the options of `PruneConfig` that make it.
Settings = Mapping[str, Mapping[str, Any]]
SETTINGS: Settings = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "2:4": {"pattern": "2:4"},
}


@dataclass(frozen=True)
class Contender:
    """A way to prune: options of `PruneConfig`, which has defaults for those that are None."""

    method: str
    update: str | None = None
    granularity: str | None = None
    quantize: str | None = None
    effort: str | None = None
    rotate: str | None = None

    def __str__(self) -> str:
        return "-".join(value for value in asdict(self).values() if value is not None)


CONTENDERS = (
    Contender("magnitude"),
    Contender("wanda"),
    Contender("sparsegpt"),
    Contender("besa", "none"),
    Contender("besa"),
)

Run = tuple[str, Contender]  # setting and contender


def compare(
    model: Path,
    out: Path,
    settings: Settings,
    contenders: Sequence[Contender],
    *,
    seqlen: int,
    text: str = "builtin:test",
    limit: int | None = None,
    batch_size: int = 8,
    reuse: bool = False,
    tell: Tell = lambda event: None,
) -> Comparison:
    """Prunes `model` into directories in `out` and measures perplexity on `text`.

    Every contender sees the same calibration samples and the same windows of the text.

    Args:
        settings: what to prune to; a directory and a row for each contender at each of them.
        seqlen: tokens in a sample, and in a window of the text.
        limit: the most windows of the text to read; None for all.
        batch_size: windows at a time.
        reuse: models that an earlier call with the same settings left in `out`.
        tell: is given every step's event (phase, what, done, total) for display.
    """
    runs = [(setting, contender) for setting in settings for contender in contenders]
    configs = {run: _config(out, run, settings[run[0]], seqlen) for run in runs}
    seconds = {}
    for number, (run, config) in enumerate(configs.items()):
        tell(Event("prune", what=Path(config.out).name, done=number, total=len(runs)))
        record = (_left(model, config) if reuse else None) or prune(model, config).record
        seconds[run] = record.seconds + (record.recovery.seconds if record.recovery else 0.0)

    asked = EvalConfig(
        texts=(text,), seqlen=seqlen, batch_size=batch_size, dtype="float32", limit=limit
    )
    names = [str(model), *(str(config.out) for config in configs.values())]
    results = evaluate(
        names,
        asked,
        lambda name, _, done, total: tell(
            Event(
                "evaluate",
                what=Path(name).name,
                done=names.index(name) + done / total,
                total=len(names),
            )
        ),
    )
    dense, *pruned = results
    by_run = dict(zip(runs, pruned, strict=True))
    rows = [
        _row(run, configs[run], by_run[run], by_run.get((run[0], _WANDA)), dense, seconds[run])
        for run in runs
    ]
    return Comparison(
        model="the embedded model" if model == MODEL else str(model),
        text=text,
        bos=dense.bos,
        seqlen=seqlen,
        tokens=dense.perplexity.tokens,
        dense=DensePerplexity(
            perplexity=dense.perplexity.perplexity,
            standard_error=dense.perplexity.standard_error,
        ),
        rows=tuple(rows),
        versions={
            "besa": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        machine=machine(),
    )


_WANDA = Contender("wanda")


def _config(out: Path, run: Run, options: Mapping[str, Any], seqlen: int) -> PruneConfig:
    """The settings of a run, into a directory of its name."""
    setting, contender = run
    given = {name: value for name, value in asdict(contender).items() if value is not None}
    if contender.effort == "high" and "samples" in options:  # as its default is
        options = {**options, "samples": 3 * options["samples"]}
    name = f"{contender}-{setting.strip('%')}".replace(":", "of")
    return PruneConfig(out=out / name, seqlen=seqlen, overwrite=True, **given, **options)


def _left(model: Path, config: PruneConfig) -> PruneRecord | None:
    """What an earlier run with the same settings left, if it is there."""
    record = read_record(Path(config.out))
    if not isinstance(record, PruneRecord):
        return None
    wanted = {**asdict(config), "model": str(model), "pattern": str(config.pattern)}
    wanted["sparsity"] = config.rate
    wanted["quantize"] = config.quantize and str(config.quantize)
    if config.dtype == "auto":  # a record says what it came to
        del wanted["dtype"]
    told = [name for name in wanted if wanted[name] is not None and name in record.settings]
    return record if all(record.settings[name] == wanted[name] for name in told) else None


def _row(
    run: Run,
    config: PruneConfig,
    result: Result,
    wanda: Result | None,
    dense: Result,
    seconds: float,
) -> ComparedRun:
    """What one run came to, beside the dense model and, if it ran, Wanda at the same setting."""
    setting, contender = run
    own = result.perplexity
    assert config.update is not None
    row = ComparedRun(
        method=config.method,
        update=config.update,
        granularity=contender.granularity,
        quantize=contender.quantize,
        effort=contender.effort,
        rotate=contender.rotate,
        setting=setting,
        perplexity=own.perplexity,
        standard_error=own.standard_error,
        sparsity=result.sparsity,
        seconds=seconds,
    )
    if wanda is None or wanda is result:
        return row
    lost = wanda.perplexity.perplexity - dense.perplexity.perplexity
    lost_nats, _ = paired(wanda.perplexity.losses, dense.perplexity.losses)
    margin, margin_se = paired(wanda.perplexity.losses, own.losses)
    return replace(
        row,
        recovered=(wanda.perplexity.perplexity - own.perplexity) / lost,
        recovered_nats=margin / lost_nats,
        margin=margin,
        margin_se=margin_se,
    )
