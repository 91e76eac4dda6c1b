"""The table of methods on the embedded model: every method at 50%, 60%, 70% and 2:4.

    python benchmarks/table.py --work /tmp/table

Perplexity on the built-in corpus's test split, with the shipped defaults; choices were made on its
validation split (`--text builtin:validation`). The record goes to benchmarks/results/table.json
and from there into README.md and docs/results.md (benchmarks/readme.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from besa.cli.comparison import print_comparison
from besa.demo import MODEL, SEQLEN
from besa.demo.compare import CONTENDERS, SETTINGS, Contender, compare
from besa.progress import steps_for
from besa.report import render_comparison
from besa.report.comparison import write_comparison

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where the models go")
    parser.add_argument("--text", default="builtin:test")
    parser.add_argument("--results", type=Path, default=RESULTS / "table.json")
    args = parser.parse_args()
    settings = {**SETTINGS, "70%": {"sparsity": 0.7}}
    settings = {name: settings[name] for name in ("50%", "60%", "70%", "2:4")}
    contenders = [
        *CONTENDERS,
        Contender("besa", "none", "layer"),
        Contender("wanda", "admm"),
        Contender("wanda", "auto"),
        Contender("besa", "admm"),
    ]
    args.work.mkdir(parents=True, exist_ok=True)
    with steps_for(sys.stderr) as tell:
        comparison = compare(
            MODEL, args.work, settings, contenders, seqlen=SEQLEN, text=args.text, tell=tell
        )
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(comparison, args.results)
    (args.work / "report.html").write_text(render_comparison(comparison), encoding="utf-8")
    print_comparison(comparison)


if __name__ == "__main__":
    main()
