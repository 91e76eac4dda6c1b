"""What models say is recorded and shown, in the record's order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.conftest import ROOT

pytestmark = pytest.mark.slow


def test_continuations_and_their_table(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import samples

    prompts = ("a b", "def ")
    said = samples.continuations(str(tiny_model), prompts)
    assert len(said) == 2
    assert samples.continuations(str(tiny_model), prompts[1:]) == said[1:]
    record = {
        "name": "A model",
        "tokens": samples.TOKENS,
        "prompts": prompts,
        "models": {"dense": ["is b\n", "one"], "half": ["*c* | d", "two"]},
    }
    table = samples.samples_table(record).splitlines()
    assert table[:5] == ["**a b** …", "", "- dense: is b …", r"- half: \*c\* \| d …", ""]
    assert table[-1].startswith("A model, greedy, 32 tokens.")
