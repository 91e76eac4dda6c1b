"""Tasks of the harness: how their texts begin, and that processes share their questions."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from besa.evaluation import tasks
from besa.model.loading import load_model, load_tokenizer
from tests.agents import Torchrun, become_agent
from tests.helpers import begin_texts, write_task

BOS = 0  # of the tiny model's tokenizer


pytestmark = pytest.mark.usefixtures("harness")


@pytest.fixture
def manager(tmp_path: Path) -> Any:
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


def evaluated(arguments: list[str], processes: int, output: Path) -> dict[str, Any]:
    """What `besa eval --json` says, run by so many forks of this process, which has the harness."""
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = output.open("w")  # the process that leads writes, and flushes it
            os._exit(become_agent(Torchrun(processes), arguments))
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.slow
def test_processes_share_the_questions(tiny_model: Path, tmp_path: Path) -> None:
    questions = [
        {"question": f"{n} and", "choices": [str(n), "one"], "answer": n % 2} for n in range(7)
    ]
    folder = write_task(tmp_path, questions)
    arguments = ["eval", str(tiny_model), "--seqlen", "32", "--limit", "1", "--device", "cpu"]
    arguments += ["--json", "--tasks", "own_task", "--task-path", str(folder)]
    one, two = (evaluated(arguments, n, tmp_path / f"{n}.json") for n in (1, 2))
    assert one["results"][0]["tasks"]["own_task"]["acc_stderr"] > 0
    assert two == one
