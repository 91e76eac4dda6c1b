"""The table of a comparison of methods, for the terminal."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from besa.report.comparison import Comparison


def print_comparison(comparison: Comparison) -> None:
    """Prints what `besa.demo.compare.compare` found."""
    dense = comparison.dense
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for head in ("perplexity", "± SE", "Wanda's loss closed", "nats better than Wanda", "time"):
        table.add_column(head, justify="right")
    table.add_row("dense", f"{dense.perplexity:.3f}", f"{dense.standard_error:.3f}")
    setting = None
    for row in comparison.rows:
        if row.setting != setting:
            setting = row.setting
            table.add_section()
            table.add_row(f"[bold]{setting}[/bold]")
        closed = margin = ""
        if row.recovered is not None:
            closed = f"{row.recovered:+.1%}"
            margin = f"{row.margin:+.4f} ± {row.margin_se:.4f}"
        table.add_row(
            f"  {row.recipe}",
            f"{row.perplexity:.3f}",
            f"{row.standard_error:.3f}",
            closed,
            margin,
            f"{row.seconds:.0f} s",
        )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    console.print(
        f"{comparison.tokens:,} tokens of {comparison.text} {comparison.windows}; "
        f"{comparison.machine}; torch {comparison.versions['torch']}",
        soft_wrap=True,
    )
