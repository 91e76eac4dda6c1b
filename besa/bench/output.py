"""The directory of a run: results.json, results.csv and report.html, all of it or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from besa.bench.page import render
from besa.bench.results import Results, results_csv, results_json
from besa.writing import write_text, writing


def write_results(results: Results, out: Path) -> None:
    """Writes the directory `out`, which may be there if it is empty.

    Raises:
        BesaError: it cannot be written.
    """
    partial = out.with_name(out.name + ".partial")
    with writing(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text(json.dumps(results_json(results), indent=1) + "\n", partial / "results.json")
        write_text(results_csv(results), partial / "results.csv")
        write_text(render(results), partial / "report.html")
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
