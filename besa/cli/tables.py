"""How tables are printed: as wide as the terminal, and not folded in a pipe."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Table


def show(table: Table) -> None:
    """Prints a table and an empty line."""
    # A pipe has no width: its lines are folded only where COLUMNS asks for it.
    free = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(width=10_000 if free else None, highlight=False)
    with console.capture() as shown:
        console.print(table)
    # A table fills its last column with spaces, and has an empty line above and below.
    lines = [line.rstrip() for line in shown.get().splitlines()]
    print(*filter(None, lines), sep="\n", end="\n\n")
