"""Pages and model cards from records.

from besa.model.record import read_record
from besa.report import model_card, render

record = read_record(Path("pruned"))   # what `besa prune` left
page, card = render(record), model_card(record)
"""

from besa.report.card import model_card
from besa.report.comparison_page import render_comparison
from besa.report.page import render

__all__ = ["model_card", "render", "render_comparison"]
