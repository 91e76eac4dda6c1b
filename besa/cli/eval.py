"""Measure perplexity, and tasks, of one or more checkpoints.

Perplexity by the field's protocol: the whole text joined, cut into windows of --seqlen tokens that
do not overlap. Several checkpoints stand side by side, with their difference to the first one:

    besa eval DENSE WANDA BESA --text FILE --seqlen 2048
    besa eval PRUNED --text wikitext2 --text c4 --json
    besa eval PRUNED --tasks piqa,arc_easy,hellaswag
    torchrun --nproc-per-node 2 -m besa eval DENSE PRUNED --seqlen 2048
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from besa.evaluation.config import EvalConfig
from besa.processes.launch import launch_of
from besa.settings import add_flags, given

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from besa.evaluation.evaluate import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="checkpoint directory, or its id on the hub"
    )
    add_flags(parser, EvalConfig)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    if not sys.stderr.isatty():
        # Bars of the libraries; before they are imported, as tqdm reads this only then.
        os.environ.setdefault("TQDM_DISABLE", "1")
    from besa.evaluation.evaluate import evaluate

    config = EvalConfig(**given(EvalConfig, args))
    with _progress() as progress:
        results = evaluate(args.models, config, progress)
    if not launch_of().leads:
        return 0
    if args.json:
        print(json.dumps({"results": [_record(r) for r in results], "versions": _versions(config)}))
    else:
        _print_tables(results, config)
    return 0


def _versions(config: EvalConfig) -> dict[str, str]:
    import platform

    from besa.version import __version__

    packages = ("torch", "transformers", *(("lm_eval",) if config.tasks else ()))
    return {
        "besa": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _record(result: Result) -> dict[str, Any]:
    perplexity = result.perplexity
    record: dict[str, Any] = {
        "model": result.model,
        "text": result.text,
        "perplexity": _finite(perplexity.perplexity),
        "standard_error": _finite(perplexity.standard_error),
        "tokens": perplexity.tokens,
        "windows": perplexity.windows,
        "seqlen": perplexity.seqlen,
        "bos": result.bos,
        "separator": result.separator,
        "dtype": result.dtype,
        "device": result.device,
    }
    if (cost := result.bos_cost) is not None:
        record["bos_cost"] = {
            "with_bos": _finite(cost.with_bos),
            "without": _finite(cost.without),
            "windows": cost.windows,
        }
    if result.difference is not None:
        nats, error = map(_finite, result.difference)
        record["difference"] = {"nats_per_token": nats, "standard_error": error}
    if result.sparsity is not None:
        record["sparsity"] = result.sparsity
    if result.tasks is not None:
        record["tasks"] = result.tasks
        record["tasks_bos"] = result.tasks_bos
    return record


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _print_tables(results: list[Result], config: EvalConfig) -> None:
    from rich.console import Console

    # A pipe has no width: do not fold its lines.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(_perplexity_table(results, config.texts))
    if config.tasks:
        console.print(_task_table(results[:: len(config.texts)]))
    for text in config.texts:
        result = next(result for result in results if result.text == text)
        first = result.perplexity
        begun = "each after a beginning token" if result.bos else "cut from one text as it comes"
        apart = "; documents end in the end token" if result.separator == "eos" else ""
        console.print(
            f"{text}: {first.tokens:,} tokens predicted in {first.windows:,} windows "
            f"of {first.seqlen}, {begun}{apart}",
            markup=False,
            soft_wrap=True,
        )
    if (cost := results[0].bos_cost) is not None:
        console.print(
            f"the first {cost.windows} windows cost {results[0].model} {cost.with_bos:.3f} nats a "
            f"token after a beginning token and {cost.without:.3f} without: --bos auto "
            f"{'puts it' if results[0].bos else 'leaves it out'}",
            markup=False,
            soft_wrap=True,
        )
    if config.tasks:
        habit = "after" if results[0].tasks_bos else "without"
        console.print(f"tasks: each text {habit} a beginning token", markup=False, soft_wrap=True)
    dtypes = ", ".join(dict.fromkeys(result.dtype for result in results))
    versions = ", ".join(f"{name} {number}" for name, number in _versions(config).items())
    console.print(f"{dtypes} on {results[0].device}; {versions}", markup=False, soft_wrap=True)


def _perplexity_table(results: list[Result], texts: tuple[str, ...]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("checkpoint")
    by_model = [results[i : i + len(texts)] for i in range(0, len(results), len(texts))]
    with_sparsity = any(result.sparsity is not None for result in results)
    with_difference = len(by_model) > 1
    if with_sparsity:
        table.add_column("sparsity", justify="right")
    for text in texts:
        table.add_column(f"perplexity\n{escape(text)}", justify="right", no_wrap=True)
        if with_difference:
            table.add_column("against\nthe first", justify="right", no_wrap=True)
    for row in by_model:
        cells = [escape(row[0].model)]
        if with_sparsity:
            cells.append("" if row[0].sparsity is None else f"{row[0].sparsity:.2%}")
        for result in row:
            perplexity = result.perplexity
            cells.append(_figure(perplexity.perplexity, perplexity.standard_error, ".3f"))
            if with_difference:
                cells.append(_ratio(result.difference))
        table.add_row(*cells)
    return table


def _ratio(difference: tuple[float, float] | None) -> str:
    """A difference in nats as what it does to the perplexity: +12.34% ± 0.56%."""
    if difference is None:
        return ""
    nats, error = difference
    ratio = math.exp(min(nats, 700.0))
    return _figure(ratio - 1, ratio * error, ".2%", sign="+")


def _figure(value: float, error: float, form: str, sign: str = "") -> str:
    """A figure with its standard error, where there is one: a single window has none."""
    return f"{value:{sign}{form}}" + ("" if math.isnan(error) else f" ± {error:{form}}")


def _task_table(results: list[Result]) -> Table:
    """A row for each metric, a column for each model; `results` holds one for each model."""
    from rich.markup import escape
    from rich.table import Table

    by_model = [result.tasks or {} for result in results]
    table = Table("task", "metric")
    for result in results:
        table.add_column(escape(result.model), justify="right")
    for task, metrics in by_model[0].items():
        for metric in metrics:
            if "_stderr" in metric:
                continue
            name, comma, rest = metric.partition(",")
            cells = []
            for scores in by_model:
                error = scores[task].get(f"{name}_stderr{comma}{rest}", math.nan)
                cells.append(_figure(scores[task][metric], error, ".4f"))
            table.add_row(escape(task), escape(metric), *cells)
    return table


@contextmanager
def _progress() -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar on standard error; where that is no terminal, a line for each tenth of the way.

    Of processes that share the work, the first one shows it.
    """
    if not launch_of().leads:
        yield lambda model, text, done, total: None
        return
    if not sys.stderr.isatty():
        yield _print_progress
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        ids: dict[tuple[str, str], Any] = {}

        def report(model: str, text: str, done: int, total: int) -> None:
            key = (model, text)
            if key not in ids or done == 0:
                ids[key] = bars.add_task(f"{model} on {text}", total=total)
            bars.update(ids[key], completed=done)

        yield report


def _print_progress(model: str, text: str, done: int, total: int) -> None:
    from besa.progress import write_line

    step = max(1, total // 10)
    if done == total or (done and done % step == 0):
        write_line(f"{model} on {text}: {done} of {total} windows", sys.stderr)
