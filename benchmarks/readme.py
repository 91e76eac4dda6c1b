"""Writes the README's figures from the result files.

python benchmarks/readme.py            # writes
python benchmarks/readme.py --check    # exit code 1 if the README is behind the results
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    ("magnitude", None): "Magnitude",
    ("wanda", None): "Wanda",
    ("sparsegpt", None): "SparseGPT (updates weights)",
    ("besa", "layer"): "BESA, rates by layer",
    ("besa", "row"): "**BESA, rates by row** (default)",
}


def table(record: dict[str, Any]) -> str:
    """The table of methods, from benchmarks/table.py."""
    settings = list(dict.fromkeys(row["setting"] for row in record["rows"]))
    rows = {(r["method"], r["granularity"], r["setting"]): r for r in record["rows"]}
    dense = record["dense"]["perplexity"]
    lines = [
        f"| perplexity | {' | '.join(settings)} |",
        f"| --- |{' --- |' * len(settings)}",
        f"| Dense | {' | '.join([f'{dense:.2f}'] * len(settings))} |",
    ]
    for (method, granularity), name in NAMES.items():
        cells = []
        for setting in settings:
            row = rows[method, granularity, setting]
            cell = f"{row['perplexity']:.2f}"
            if row["recovered"] is not None and method != "magnitude":
                cell += f" (closed {row['recovered']:.0%})"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    margins = ", ".join(
        f"{rows['besa', 'row', s]['margin']:.3f} ± {rows['besa', 'row', s]['margin_se']:.3f} at {s}"
        for s in settings
    )
    lines += [
        "",
        f"BESA's margin over Wanda in nats a token: {margins}. {record['tokens']:,} tokens, "
        f"windows of {record['seqlen']}; {record['machine']}; torch {record['versions']['torch']}. "
        "`python benchmarks/table.py --work DIR`.",
    ]
    return "\n".join(lines)


SECTIONS = {"table": ("table.json", table)}


def filled(text: str) -> str:
    """The README with every marked section as the results say."""
    for name, (file, render) in SECTIONS.items():
        body = render(json.loads((RESULTS / file).read_text()))
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m: m[1] + body + "\n" + m[2], text, flags=re.S)  # noqa: B023
        if count != 1:
            raise SystemExit(f"README.md has {count} sections marked {name}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = filled(text)
    if args.check:
        raise SystemExit("README.md is behind benchmarks/results" if new != text else 0)
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
