"""Prunes one model by several methods at several settings and compares what is left.

record = compare(MODEL, Path("demo"), SETTINGS, CONTENDERS, seqlen=256)
Path("demo/report.html").write_text(render_comparison(record))
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from besa.demo import MODEL
from besa.evaluation.config import EvalConfig
from besa.evaluation.evaluate import Result, evaluate
from besa.evaluation.perplexity import paired
from besa.machine import machine
from besa.progress import Event, Tell
from besa.pruning.config import PruneConfig
from besa.pruning.pipeline import prune
from besa.version import __version__

# The name of a setting and the options of `PruneConfig` that make it.
Settings = Mapping[str, Mapping[str, Any]]
SETTINGS: Settings = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "2:4": {"pattern": "2:4"},
}

# (method, granularity); a granularity means something to BESA only.
Contenders = Sequence[tuple[str, str | None]]
CONTENDERS: Contenders = (
    ("magnitude", None),
    ("wanda", None),
    ("sparsegpt", None),
    ("besa", "row"),
)


def compare(
    model: Path,
    out: Path,
    settings: Settings,
    contenders: Contenders,
    *,
    seqlen: int,
    text: str = "builtin:test",
    limit: int | None = None,
    tell: Tell = lambda event: None,
) -> dict[str, Any]:
    """Prunes `model` into directories in `out` and measures perplexity on `text`.

    `limit` bounds the windows of the text that are read.

    Every contender sees the same calibration samples and the same windows of the text.

    Returns:
        A record for `besa.report.render_comparison`: the dense model, and a row for each
        contender at each setting. `recovered` is the share of Wanda's loss of perplexity over the
        dense model that is closed, `recovered_nats` the same of the mean loss in nats; `margin`
        is by how many nats a token the contender beats Wanda on the same windows, with its paired
        standard error.
    """
    runs = [(setting, *contender) for setting in settings for contender in contenders]
    seconds = {}
    directories = {}
    for number, (setting, method, granularity) in enumerate(runs):
        name = "-".join(filter(None, (method, granularity, setting.strip("%").replace(":", "of"))))
        options = dict(settings[setting])
        if granularity:
            options["granularity"] = granularity
        config = PruneConfig(
            out=out / name, method=method, seqlen=seqlen, overwrite=True, **options
        )
        tell(Event("prune", what=name, done=number, total=len(runs)))
        seconds[setting, method, granularity] = prune(model, config).record["seconds"]
        directories[setting, method, granularity] = str(out / name)

    asked = EvalConfig(texts=(text,), seqlen=seqlen, batch_size=8, dtype="float32", limit=limit)
    names = [str(model), *directories.values()]
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
    by_run = dict(zip(directories, pruned, strict=True))
    return {
        "model": "the embedded model" if model == MODEL else str(model),
        "text": text,
        "seqlen": seqlen,
        "tokens": dense.perplexity.tokens,
        "dense": {
            "perplexity": dense.perplexity.perplexity,
            "standard_error": dense.perplexity.standard_error,
        },
        "rows": [
            {
                "method": method,
                "granularity": granularity,
                "setting": setting,
                **_figures(by_run[run], by_run.get((setting, "wanda", None)), dense),
                "seconds": seconds[run],
            }
            for run in runs
            for setting, method, granularity in [run]
        ],
        "versions": {
            "besa": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "machine": machine(),
    }


def _figures(result: Result, wanda: Result | None, dense: Result) -> dict[str, Any]:
    own = result.perplexity
    figures: dict[str, Any] = {
        "perplexity": own.perplexity,
        "standard_error": own.standard_error,
        "sparsity": result.sparsity,
        "recovered": None,
        "recovered_nats": None,
        "margin": None,
        "margin_se": None,
    }
    if wanda is not None and wanda is not result:
        lost = wanda.perplexity.perplexity - dense.perplexity.perplexity
        margin, error = paired(wanda.perplexity.losses, own.losses)
        lost_nats, _ = paired(wanda.perplexity.losses, dense.perplexity.losses)
        figures["recovered"] = (wanda.perplexity.perplexity - own.perplexity) / lost
        figures["recovered_nats"] = margin / lost_nats
        figures["margin"], figures["margin_se"] = margin, error
    return figures
