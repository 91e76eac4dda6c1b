"""Measure what serving a sparse model gains, and what it costs.

besa bench SPARSE --against DENSE                          # the same engine, the same flags
besa bench SPARSE --against DENSE --concurrency 1,4,16 --rate auto --slo ttft=500ms,itl=50ms
besa bench --url old=http://127.0.0.1:8000 --url new=http://127.0.0.1:8001
besa bench SPARSE --against DENSE --offline --batch 1,8     # the engines without HTTP
besa bench --shape tinyllama --sparsity 0.5 --pattern 2:4   # random weights: no model needed
besa bench compare OLD/results.json NEW/results.json        # exit code 1 if something got slower

Every contender runs at the same time and is measured in turns while the others rest, so that what
the machine does meanwhile touches all alike; figures are medians over the rounds, and gains are
paired round by round. --out gets results.json, results.csv and report.html.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from besa.bench.settings import BenchConfig, parse_contender, parse_loads, parse_url
from besa.kernels.abi import WHOLE
from besa.settings import add_flags, given

if TYPE_CHECKING:
    from besa.bench.events import OnEvent
    from besa.bench.results import Results
    from besa.bench.settings import Contender


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "besa bench SPARSE --against DENSE [--against OTHER …] [options]\n"
        "       besa bench --url NAME=URL [--url NAME=URL …] [options]\n"
        "       besa bench --shape SHAPE [--sparsity S] [--pattern P] [options]\n"
        "       besa bench compare A.json B.json [--threshold 0.05]"
    )
    parser.add_argument(
        "operands", nargs="*", metavar="SPARSE", help="directory or hub id of a model, or NAME=it"
    )
    contenders = parser.add_argument_group("contenders")
    add = contenders.add_argument
    add(
        "--against",
        action="append",
        default=[],
        metavar="[NAME=]MODEL",
        help="a model to compare with; the first one is what all are compared with",
    )
    add(
        "--url",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a server that runs already; with #MODEL after the URL if it has several. Its key is "
        "taken from OPENAI_API_KEY",
    )
    add_flags(contenders, BenchConfig, "engine", "engine_args")
    add(
        "--shape",
        help="tinyllama, llama-3.2-1b, llama-2-7b, qwen3-30b-a3b, gpt-oss-20b, mixtral-8x7b or a "
        "config.json: random weights",
    )
    add("--layers", type=int, metavar="N", help="of --shape: only so many, so that it fits")
    add("--sparsity", type=float, default=0.5, help="of --shape (default: %(default)s)")
    add(
        "--pattern",
        default="unstructured",
        help="of --shape: unstructured, 2:4, … (default: %(default)s)",
    )
    add("--quantize", choices=WHOLE, help="of --shape: how the packed values are stored")
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keeps the models of --shape there for next time (default: they are removed)",
    )
    load = parser.add_argument_group("load")
    add = load.add_argument
    add("--concurrency", metavar="N,N", help="requests at a time (default: 1,4 without --rate)")
    add("--rate", metavar="R,R", help="requests per second; auto for a sweep up to saturation")
    add_flags(load, BenchConfig, "slo", "slo_share", "input_length", "output_length", "prompts")
    add_flags(load, BenchConfig, "requests", "rounds", "warmup", "seed", "generator", "tokenizer")
    add_flags(load, BenchConfig, "timeout", "start_timeout")
    add = parser.add_argument_group("without HTTP").add_argument
    add(
        "--offline",
        action="store_true",
        help="measure inside the engines: every one that is installed, or --engine's",
    )
    add("--batch", default="1,4", metavar="N,N", help="batch sizes (default: %(default)s)")
    results = parser.add_argument_group("results")
    add_flags(results, BenchConfig, "quality", "text", "windows", "out")
    results.add_argument(
        "--threshold",
        type=float,
        default=0.05,
        help="of `besa bench compare`: how much worse is a regression (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    if args.operands[:1] == ["compare"]:
        return _compare(args)
    from besa.errors import BesaError
    from besa.model.workspace import check_free

    if len(args.operands) > 1:
        raise BesaError(f"one model at a time, and --against others: what is {args.operands[1]!r}?")
    if args.against and not args.operands and not args.shape:
        raise BesaError("--against needs a model before it: besa bench SPARSE --against DENSE")
    asked = {"out": Path(time.strftime("besa-bench-%Y%m%d-%H%M%S")), **given(BenchConfig, args)}
    check_free(asked["out"], overwrite=False)
    auto = args.rate == "auto"
    concurrency = parse_loads(args.concurrency, "concurrency")
    rates = () if auto else parse_loads(args.rate, "rate")
    if not concurrency and (auto or not rates):
        concurrency = parse_loads("1,4", "concurrency")
    contenders = [parse_contender(text) for text in (*args.against, *args.operands)]
    with (
        _random_models(args) if args.shape else nullcontext(()) as made,
        terminated(),
        shown_events() as on_event,
    ):
        config = BenchConfig(
            contenders=(*made, *contenders, *map(parse_url, args.url)),
            loads=(*concurrency, *rates),
            auto_rates=auto,
            **asked,
        )
        results = _measure(config, args, on_event)
    return _finish(results, config.out)


def _measure(config: BenchConfig, args: argparse.Namespace, on_event: OnEvent) -> Results:
    if args.offline:
        from besa.bench.offline import bench_offline

        batches = [int(load.value) for load in parse_loads(args.batch, "concurrency")]
        return bench_offline(config, batches, on_event)
    from besa.bench.run import bench

    return bench(config, on_event)


@contextmanager
def _random_models(args: argparse.Namespace) -> Iterator[tuple[Contender, ...]]:
    from besa.bench.random_models import random_contenders

    with (
        terminated(),
        shown_events() as on_event,
        random_contenders(
            args.shape,
            args.sparsity,
            args.pattern,
            args.quantize,
            args.cache,
            on_event,
            args.layers,
        ) as made,
    ):
        yield made


def _finish(results: Results, out: Path) -> int:
    """Writes and shows the results; the exit code is 1 if a contender is broken."""
    from rich.console import Console

    from besa.bench.output import write_results
    from besa.bench.table import print_results

    write_results(results, out)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    print_results(results, console)
    console.print(f"{out}/report.html, results.json, results.csv", markup=False, soft_wrap=True)
    return 1 if results.broken else 0


def _compare(args: argparse.Namespace) -> int:
    from besa.bench.compare import compare_files
    from besa.errors import BesaError

    if len(args.operands) != 3:
        raise BesaError("compare takes two files: besa bench compare A.json B.json")
    lines, regressions = compare_files(
        Path(args.operands[1]), Path(args.operands[2]), args.threshold
    )
    print("\n".join(lines))
    return 1 if regressions else 0


@contextmanager
def shown_events() -> Iterator[OnEvent]:
    """A receiver of `besa bench`'s events: a line that changes on a terminal, else a line each."""
    from rich.console import Console

    from besa.bench.events import Broken, Event
    from besa.progress import write_line

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda event: write_line(str(event), sys.stderr)
        return
    with console.status("") as status:

        def show(event: Event) -> None:
            if isinstance(event, Broken):
                console.print(str(event), style="red", markup=False)
            else:
                status.update(str(event))

        yield show


@contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM and SIGHUP end things as Ctrl-C does: with everything that was started."""

    def stop(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(f"ended by {signal.Signals(number).name}; nothing is left running")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
