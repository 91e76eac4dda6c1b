"""Tasks of the harness: how their texts begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from besa.evaluation import tasks
from besa.model.loading import load_model, load_tokenizer
from tests.helpers import begin_texts, write_task

BOS = 0  # of the tiny model's tokenizer


@pytest.fixture
def manager(tmp_path: Path) -> Any:
    pytest.importorskip("lm_eval")
    question = {"question": "fox", "choices": [" jumps", " sleeps"], "answer": 0}
    return tasks.find(["own_task"], write_task(tmp_path, [question]))


@pytest.mark.parametrize(
    ("habit", "bos", "begun"),
    [
        (False, "auto", False),
        (False, "always", True),
        (False, "never", False),
        (True, "auto", True),
        (True, "always", True),
        (True, "never", False),
    ],
)
def test_texts_begin_as_asked(
    tiny_model: Path, manager: Any, habit: bool, bos: str, begun: bool
) -> None:
    """By what reaches the model."""
    model, tokenizer = load_model(tiny_model, "float32", "cpu"), load_tokenizer(tiny_model)
    if habit:
        begin_texts(tokenizer)
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0].tolist()))
    tasks.run(model, tokenizer, ["own_task"], manager, 0, 1, bos)
    assert len(seen) == 2
    assert all((row[0] == BOS) == begun and BOS not in row[1:] for row in seen)
