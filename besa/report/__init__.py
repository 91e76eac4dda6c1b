"""Pages and model cards from a run's record.

import json, pathlib
from besa.report import model_card, render

record = json.loads(pathlib.Path("pruned/besa.json").read_text())
pathlib.Path("pruned/report.html").write_text(render(record), encoding="utf-8")
pathlib.Path("pruned/README.md").write_text(model_card(record), encoding="utf-8")
"""

from besa.report.card import model_card
from besa.report.comparison import render_comparison
from besa.report.page import render

__all__ = ["model_card", "render", "render_comparison"]
