"""Pages and model cards from records.

>>> from pathlib import Path
>>> from besa.model.record import read_record
>>> record = read_record(Path("path/to/pruned"))     # what `besa prune` left
>>> render(record).startswith("<!doctype html>")
True
>>> print(model_card(record))
---
...
"""

from besa.report.card import model_card
from besa.report.comparison_page import render_comparison
from besa.report.page import render

__all__ = ["model_card", "render", "render_comparison"]
