"""The table of methods: one model, every method at 50%, 60%, 70% and 2:4.

    python benchmarks/table.py --work /tmp/table                     # the embedded model
    python benchmarks/table.py --work /tmp/real --model path/to/gemma --name "Gemma 3 270M" \
        --calibration wikitext2-valid.txt --text wikitext2-test.txt --samples 64 --seqlen 512 \
        --batch-size 1 --limit 32 --settings 50% --contenders wanda besa-none besa \
        --results benchmarks/results/real.json --reuse --add

Perplexity with the shipped defaults; choices were made on other text (`--text builtin:validation`).
After each setting the record is written, with all settings so far, and with `--add` also what an
earlier call measured on the same text. It goes to
benchmarks/results/table.json and from there into README.md and docs/results.md
(benchmarks/readme.py).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from besa.cli.comparison import print_comparison
from besa.demo import MODEL, SEQLEN
from besa.demo.compare import CONTENDERS, Contender, compare
from besa.progress import steps_for
from besa.report import render_comparison
from besa.report.comparison import Comparison, read_comparison, write_comparison

RESULTS = Path(__file__).parent / "results"
ALL = (
    *CONTENDERS,
    Contender("wanda", "admm"),
    Contender("wanda", "auto"),
    Contender("besa", "none", "layer"),
    Contender("besa", "admm"),
    Contender("besa", quantize="int8"),
    Contender("besa", quantize="int4:64"),
    Contender("besa", rotate="on"),
    Contender("besa", effort="high"),
    Contender("besa", effort="high", rotate="on"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="where the models go")
    add("--model", type=Path, default=MODEL)
    add("--name", help="of the model, in the record")
    add("--calibration", default="builtin")
    add("--text", default="builtin:test")
    add("--samples", type=int, default=128)
    add("--seqlen", type=int, default=SEQLEN)
    add("--batch-size", type=int, default=8)
    add("--limit", type=int, help="the most windows of the text to read")
    add("--reuse", action="store_true", help="models that an earlier call left in --work")
    add("--add", action="store_true", help="to what --results holds")
    add("--settings", nargs="+", default=["50%", "60%", "70%", "2:4"])
    add("--contenders", nargs="+", default=[str(one) for one in ALL], metavar="METHOD[-UPDATE]")
    add("--results", type=Path, default=RESULTS / "table.json")
    args = parser.parse_args()
    chosen = [one for one in ALL if str(one) in args.contenders]
    args.work.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    shared = {"calibration": args.calibration, "samples": args.samples}
    found = read_comparison(args.results) if args.add and args.results.exists() else None
    for setting in args.settings:
        with steps_for(sys.stderr) as tell:
            new = compare(
                args.model,
                args.work,
                {setting: {**target(setting), **shared}},
                chosen,
                seqlen=args.seqlen,
                text=args.text,
                limit=args.limit,
                batch_size=args.batch_size,
                reuse=args.reuse,
                tell=tell,
            )
        found = together(found, told(new, args))
        write_comparison(found, args.results)
        print_comparison(found)
        (args.work / "report.html").write_text(render_comparison(found), encoding="utf-8")


def target(setting: str) -> dict[str, Any]:
    """What a setting's name, "50%" or "2:4", asks of a run."""
    if setting.endswith("%"):
        return {"sparsity": int(setting.rstrip("%")) / 100}
    return {"pattern": setting}


def together(before: Comparison | None, new: Comparison) -> Comparison:
    """Both on the same text; of a run that is in both, what the new one measured."""
    if before is None:
        return new
    for name in ("model", "text", "bos", "settings", "seqlen", "tokens"):
        assert getattr(before, name) == getattr(new, name), f"another {name}"
    measured = {(row.recipe, row.setting) for row in new.rows}
    kept = [row for row in before.rows if (row.recipe, row.setting) not in measured]
    return replace(new, rows=(*kept, *new.rows))


def told(comparison: Comparison, args: argparse.Namespace) -> Comparison:
    """A comparison that names its model and texts without the folders around them."""
    settings = {"calibration": Path(args.calibration).name, "samples": args.samples}
    return replace(
        comparison,
        model=args.name or comparison.model,
        text=Path(args.text).name,
        settings=settings,
    )


if __name__ == "__main__":
    main()
