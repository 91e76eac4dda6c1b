"""besa's own warnings: one line for the command line's users, warnings for callers in Python."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from besa.cli import _warnings_of
from besa.errors import BesaWarning
from besa.kernels import native
from tests.helpers import PATIENCE, REPOSITORY

WITHOUT_KERNELS = """
import sys
from besa.kernels import native
native.NAME = "libnone.so"
from besa.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_missing_kernels_are_one_line(tiny_model: Path, tmp_path: Path):
    options = ["--samples", "4", "--seqlen", "32", "--device", "cpu"]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS, "prune", tiny_model, "--out", "out", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 0, process.stderr
    (line,) = (x for x in process.stderr.splitlines() if not x.startswith("block "))
    assert line.startswith("besa prune: no native kernels, torch serves instead, slower: libnone")


def test_missing_kernels_warn_in_python(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "NAME", "libnone.so")
    with pytest.warns(BesaWarning, match=r"no native kernels.*libnone\.so was not built"):
        assert native.library.__wrapped__() is None


def test_others_warnings_are_shown_as_ever(capsys: pytest.CaptureFixture[str]):
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with _warnings_of("prune"):
            warnings.warn("theirs", UserWarning, stacklevel=1)
            warnings.warn("ours", BesaWarning, stacklevel=1)
    assert [str(x.message) for x in others] == ["theirs"]
    assert capsys.readouterr().err == "besa prune: ours\n"
