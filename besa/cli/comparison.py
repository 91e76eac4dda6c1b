"""The table of a comparison of methods, for the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

NAMES = {"besa": "BESA", "wanda": "Wanda", "sparsegpt": "SparseGPT", "magnitude": "Magnitude"}


def print_comparison(record: dict[str, Any]) -> None:
    """Prints the record of `besa.demo.compare.compare`."""
    dense = record["dense"]
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for head in ("perplexity", "± SE", "Wanda's loss closed", "nats better than Wanda", "time"):
        table.add_column(head, justify="right")
    table.add_row("dense", f"{dense['perplexity']:.3f}", f"{dense['standard_error']:.3f}")
    setting = None
    for row in record["rows"]:
        if row["setting"] != setting:
            setting = row["setting"]
            table.add_section()
            table.add_row(f"[bold]{setting}[/bold]")
        name = NAMES[row["method"]]
        if row["granularity"]:
            name += f", rates by {row['granularity']}"
        closed = margin = ""
        if row["recovered"] is not None:
            closed = f"{row['recovered']:+.1%}"
            margin = f"{row['margin']:+.4f} ± {row['margin_se']:.4f}"
        table.add_row(
            f"  {name}",
            f"{row['perplexity']:.3f}",
            f"{row['standard_error']:.3f}",
            closed,
            margin,
            f"{row['seconds']:.0f} s",
        )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    console.print(
        f"{record['tokens']:,} tokens of {record['text']} in windows of {record['seqlen']}; "
        f"{record['machine']}; torch {record['versions']['torch']}",
        soft_wrap=True,
    )
