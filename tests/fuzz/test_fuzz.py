"""Some of the damage that `make fuzz` does: each is refused, changes nothing, or fails a digest."""

from __future__ import annotations

import os
import signal
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.fuzz.damage import Damage
from tests.fuzz.models import make_models
from tests.fuzz.outcome import Outcome, in_child, outcome

# Seeds at which something was found once, and some more.
FOUND = (22, 215, 250, 264, 275, 400, 964)
SEEDS = (*FOUND, *range(1000, 1040))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def test_damage_is_refused_or_changes_nothing_or_fails_a_digest(
    models: dict[str, Path], tmp_path: Path
):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has none of the others
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [outcome(models, seed, tmp_path) for seed in SEEDS]
    finally:
        torch.set_num_threads(threads)
    assert [str(each) for each in found if not each.is_good] == []
    results = Counter(each.result for each in found)
    assert results["refused"] > results["numbers"] > 0  # what is tried is worth trying
    assert all(each.words for each in found if each.result == "refused")


def test_what_must_not_be_is_noticed():
    """A crash, a traceback and a hang are no outcomes that may be."""
    assert in_child(lambda: ("same", "")) == ("same", "")
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGKILL)) == ("died", "SIGKILL")
    result, words = in_child(lambda: 1 / 0)
    assert (result, "ZeroDivisionError" in words) == ("raised", True)
    damage = Damage("model.onnx", "a bit")
    for bad in ("died", "raised", "silent"):
        assert not Outcome(0, "m", damage, bad, "").is_good
