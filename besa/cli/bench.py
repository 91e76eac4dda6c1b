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
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "besa bench SPARSE --against DENSE [--against OTHER …] [options]\n"
        "       besa bench --url NAME=URL [--url NAME=URL …] [options]\n"
        "       besa bench --shape SHAPE [--sparsity S] [--pattern P] [options]\n"
        "       besa bench compare A.json B.json [--threshold 0.05]"
    )
    parser.add_argument(
        "words", nargs="*", metavar="SPARSE", help="directory or hub id of a model, or NAME=it"
    )
    add = parser.add_argument_group("contenders").add_argument
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
    add("--engine", help="vllm or transformers (default: vllm where it is installed)")
    add(
        "--engine-args",
        dest="engine_flags",
        default="",
        metavar="'FLAGS'",
        help="flags for the engine, of every contender alike: --engine-args='--max-model-len 2048'",
    )
    add("--shape", help="tinyllama, llama-3.2-1b, llama-2-7b or a config.json: random weights")
    add("--sparsity", type=float, default=0.5, help="of --shape (default: %(default)s)")
    add(
        "--pattern",
        default="unstructured",
        help="of --shape: unstructured, 2:4, … (default: %(default)s)",
    )
    add("--quantize", choices=("int8",), help="of --shape: how the packed values are stored")
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keeps the models of --shape there for next time (default: they are removed)",
    )
    add = parser.add_argument_group("load").add_argument
    add("--concurrency", metavar="N,N", help="requests at a time (default: 1,4 without --rate)")
    add("--rate", metavar="R,R", help="requests per second; auto for a sweep up to saturation")
    add("--slo", metavar="LIMITS", help="search for the highest rate within ttft=500ms,itl=50ms")
    add(
        "--slo-share",
        type=float,
        default=0.9,
        metavar="S",
        help="share of requests that have to be within the limits (default: %(default)s)",
    )
    add("--input-len", type=int, default=128, metavar="N", help="tokens (default: %(default)s)")
    add("--output-len", type=int, default=64, metavar="N", help="tokens (default: %(default)s)")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts instead of synthetic ones: one a line, or .jsonl with a prompt or text",
    )
    add(
        "--requests",
        type=int,
        default=8,
        metavar="N",
        help="in each measurement, and at least 4 for each at a time (default: %(default)s)",
    )
    add("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    add(
        "--warmup",
        type=int,
        default=1,
        metavar="N",
        help="requests before each measurement that do not count (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")
    add("--generator", help="vllm or guidellm (default: vllm's where it is installed)")
    add("--tokenizer", metavar="DIR", help="to count --input-len with, where there are only URLs")
    add(
        "--timeout",
        type=float,
        default=600,
        metavar="SECONDS",
        help="for one measurement; a contender that takes longer hangs (default: %(default)g)",
    )
    add(
        "--start-timeout",
        type=float,
        default=900,
        metavar="SECONDS",
        help="for a server to start (default: %(default)g)",
    )
    add = parser.add_argument_group("without HTTP").add_argument
    add(
        "--offline",
        action="store_true",
        help="measure inside the engines: every one that is installed, or --engine's",
    )
    add("--batch", default="1,4", metavar="N,N", help="batch sizes (default: %(default)s)")
    add = parser.add_argument_group("results").add_argument
    add("--skip-quality", action="store_true", help="do not measure perplexity")
    add("--text", default="builtin:test", help="what perplexity is measured on, as in `besa eval`")
    add(
        "--windows",
        type=int,
        default=32,
        metavar="N",
        help="windows of it, as `besa eval --limit` (default: %(default)s)",
    )
    add("--out", type=Path, metavar="DIR", help="(default: besa-bench-DATE-TIME)")
    add(
        "--threshold",
        type=float,
        default=0.05,
        help="of `besa bench compare`: how much worse is a regression (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    if args.words[:1] == ["compare"]:
        return _compare(args)
    from besa.bench.settings import BenchConfig, parse_contender, parse_loads, parse_slo, parse_url
    from besa.errors import BesaError
    from besa.model.workspace import check_free

    if len(args.words) > 1:
        raise BesaError(f"one model at a time, and --against others: what is {args.words[1]!r}?")
    if args.against and not args.words and not args.shape:
        raise BesaError("--against needs a model before it: besa bench SPARSE --against DENSE")
    out = args.out or Path(time.strftime("besa-bench-%Y%m%d-%H%M%S"))
    check_free(out, overwrite=False)
    auto = args.rate == "auto"
    concurrency = parse_loads(args.concurrency, "concurrency")
    rates = () if auto else parse_loads(args.rate, "rate")
    if not concurrency and (auto or not rates):
        concurrency = parse_loads("1,4", "concurrency")
    contenders = [parse_contender(words) for words in (*args.against, *args.words)]
    with (
        _shapes(args) if args.shape else nullcontext(()) as made,
        terminated(),
        telling() as tell,
    ):
        config = BenchConfig(
            contenders=(*made, *contenders, *map(parse_url, args.url)),
            out=out,
            loads=(*concurrency, *rates),
            auto_rates=auto,
            slo=parse_slo(args.slo) if args.slo else {},
            slo_share=args.slo_share,
            input_length=args.input_len,
            output_length=args.output_len,
            prompts=args.prompts,
            requests=args.requests,
            rounds=args.rounds,
            warmup=args.warmup,
            seed=args.seed,
            engine=args.engine,
            engine_args=tuple(shlex.split(args.engine_flags)),
            generator=args.generator,
            tokenizer=args.tokenizer,
            timeout=args.timeout,
            start_timeout=args.start_timeout,
            quality=not args.skip_quality,
            text=args.text,
            windows=args.windows,
        )
        results = _measure(config, args, tell)
    return _finish(results, out)


def _measure(config: Any, args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    if args.offline:
        from besa.bench.offline import bench_offline
        from besa.bench.settings import parse_loads

        batches = [int(load.value) for load in parse_loads(args.batch, "concurrency")]
        return bench_offline(config, batches, tell)
    from besa.bench.run import bench

    return bench(config, tell)


@contextmanager
def _shapes(args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    from besa.bench.shapes import shape_contenders

    with (
        terminated(),
        telling() as tell,
        shape_contenders(
            args.shape, args.sparsity, args.pattern, args.quantize, args.cache, tell
        ) as made,
    ):
        yield made


def _finish(results: dict[str, Any], out: Path) -> int:
    """Writes and shows the results; the exit code is 1 if a contender is broken."""
    from rich.console import Console

    from besa.bench.output import write_results
    from besa.bench.table import print_results

    write_results(results, out)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    print_results(results, console)
    console.print(f"{out}/report.html, results.json, results.csv", markup=False, soft_wrap=True)
    return 1 if any(one["broken"] is not None for one in results["contenders"]) else 0


def _compare(args: argparse.Namespace) -> int:
    from besa.bench.compare import compare_files
    from besa.errors import BesaError

    if len(args.words) != 3:
        raise BesaError("compare takes two files: besa bench compare A.json B.json")
    lines, regressions = compare_files(Path(args.words[1]), Path(args.words[2]), args.threshold)
    print("\n".join(lines))
    return 1 if regressions else 0


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """A line that changes on a terminal, else a line for each thing."""
    from rich.console import Console

    from besa.progress import write_line

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda words: write_line(words, sys.stderr)
        return
    with console.status("") as status:

        def tell(words: str) -> None:
            if "is broken" in words:
                console.print(words, style="red", markup=False)
            else:
                status.update(words)

        yield tell


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
