"""Show what besa does, on a small trained model that it carries.

Prunes the model with every method at 50%, 60% and 2:4, measures what each loses, and ends in a
table and a page with pictures. No network and no GPU needed; a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

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
    from besa.files import write_text
    from besa.progress import steps_for
    from besa.report import render_comparison

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BesaError(f"cannot write to {args.out}: {error.strerror}") from None
    with steps_for(sys.stderr) as tell:
        record = compare(
            MODEL, args.out, SETTINGS, CONTENDERS, seqlen=SEQLEN, limit=_WINDOWS, tell=tell
        )
    write_text(json.dumps(record, indent=1), args.out / "comparison.json")
    write_text(render_comparison(record), args.out / "report.html")
    print_comparison(record)
    print(f"The pictures: {args.out}/report.html. Each model has a page of its own beside it.")
    print(f"Try: besa eval {args.out}/besa-row-50 --seqlen {SEQLEN}")
    return 0
