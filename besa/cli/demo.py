"""Show what besa does, on a small trained model that it carries.

Prunes the model with every method at 50%, 60% and 2:4 and measures what each loses; then packs one,
serves it beside the dense model and measures both. Ends in tables and pages with pictures. No
network and no GPU needed; some five minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from besa.bench.results import Results

# Windows of the test text to read: half of them say enough in half the time.
_WINDOWS = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("besa-demo"),
        metavar="DIR",
        help="where the models and the page go (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from besa.cli.comparison import print_comparison
    from besa.demo import MODEL, SEQLEN
    from besa.demo.compare import CONTENDERS, SETTINGS, compare
    from besa.errors import BesaError
    from besa.progress import steps_for
    from besa.report import render_comparison
    from besa.report.comparison import write_comparison
    from besa.writing import write_text

    print(
        f"besa demo: prunes a small model {len(SETTINGS) * len(CONTENDERS)} times and measures "
        "each result, then serves one beside the dense model: some five minutes on two cores",
        file=sys.stderr,
    )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BesaError(f"cannot write to {args.out}: {error.strerror}") from None
    with steps_for(sys.stderr) as tell:
        comparison = compare(
            MODEL, args.out, SETTINGS, CONTENDERS, seqlen=SEQLEN, limit=_WINDOWS, tell=tell
        )
    write_comparison(comparison, args.out / "comparison.json")
    write_text(render_comparison(comparison), args.out / "report.html")
    print_comparison(comparison)
    results = _bench(args.out)
    print(f"The pictures: {args.out}/report.html. Each model has a page of its own beside it.")
    print(f"Served and measured: {args.out}/bench/report.html.")
    print(f"Try: besa eval {args.out}/besa-50 --seqlen {SEQLEN}")
    print(f"     besa serve {args.out}/packed")
    print("     besa bench --shape tinyllama    # too big for any cache, where zeros pay")
    return 1 if results.broken else 0


def _bench(out: Path) -> Results:
    """Serves what BESA left of the model, packed; shows what was measured."""
    from rich.console import Console

    from besa.bench.table import print_results
    from besa.cli.bench import shown_events, terminated
    from besa.demo.serving import serve_and_measure

    with terminated(), shown_events() as on_event:
        results = serve_and_measure(out / "besa-50", out, on_event)
    print_results(results, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    return results
