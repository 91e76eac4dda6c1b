"""What a pruned model's directory says of it: besa.json, a model card and a page.

>>> from besa.model.record import read_record
>>> write_pages(read_record(Path("path/to/pruned")), Path("."))
>>> sorted(path.name for path in Path(".").glob("*.*"))
['README.md', 'besa.json', 'report.html']
"""

from __future__ import annotations

from pathlib import Path

from besa.model.prune_record import PruneRecord
from besa.model.record import write_record
from besa.report import model_card, render
from besa.writing import write_text


def write_pages(record: PruneRecord, directory: Path) -> None:
    """Writes all three, each whole or not at all.

    Raises:
        BesaError: one could not be written.
    """
    write_record(record, directory)
    write_text(model_card(record), directory / "README.md")
    write_text(render(record), directory / "report.html")
