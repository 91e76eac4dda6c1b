"""Zero-shot and few-shot tasks, run by EleutherAI's lm-evaluation-harness.

    besa eval MODEL --tasks piqa,arc_easy

The harness is the extra `eval` (https://github.com/EleutherAI/lm-evaluation-harness). Its tasks
come from the hub; definitions of one's own, on local data, come from a directory. Several processes
share a task's questions in the harness's own way, by the model's `rank` and `world_size`.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa.data.beginning import begin_texts
from besa.errors import BesaError, one_line
from besa.processes.ranks import ALONE, Ranks


def find(names: Sequence[str], task_path: Path | None = None) -> Any:
    """Finds every task, so that a wrong name costs no model's loading.

    Args:
        names: tasks, groups or globs of them.
        task_path: a directory with task definitions besides the harness's own.

    Returns:
        The harness's index, a `TaskManager`, that holds them all.

    Raises:
        BesaError: no harness, no such directory, or no such task.
    """
    if task_path is not None and not task_path.is_dir():
        raise BesaError(f"--task-path {task_path} is no directory")
    with _harness():
        from lm_eval.tasks import TaskManager

        # To read the harness's own definitions, thousands, takes it ten seconds.
        for own_alone in (True, False) if task_path else (False,):
            manager = TaskManager(
                include_path=str(task_path) if task_path else None, include_defaults=not own_alone
            )
            unknown = [name for name in names if not manager.match_tasks([name])]
            if not unknown:
                return manager
    raise BesaError(f"lm-evaluation-harness has no task {unknown[0]}: see `lm-eval ls tasks`")


def run(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    manager: Any,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    bos: str = "auto",
    ranks: Ranks = ALONE,
) -> dict[str, dict[str, float]]:
    """Runs tasks on a loaded model.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        names: tasks, groups or globs of them.
        manager: what `find` gave for them.
        num_fewshot: examples before each question; None for each task's own default.
        batch_size: sequences in one call of the model.
        bos: whether texts begin with the tokenizer's beginning token, see `besa.data.beginning`;
            auto is the harness's own way, as the tokenizer does it. `always` changes the tokenizer.
        ranks: the processes that share the questions; each gets the figures of all.

    Returns:
        {task: {metric: value}}; the standard error of `acc` is `acc_stderr`. A metric that is
        taken after a filter is named `metric,filter`.

    Raises:
        BesaError: the harness fails, as when the tasks' data cannot be had.
    """
    with _harness():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        if bos == "always":
            begin_texts(tokenizer)
        special = {"always": True, "never": False}.get(bos)

        class Shared(HFLM):  # type: ignore[misc]
            """A model that is loaded already, as one of several processes has it."""

            rank = property(lambda _: ranks.rank)
            world_size = property(lambda _: ranks.size)

            def all_gather(self, tensor: Tensor) -> Tensor:
                return torch.tensor(ranks.gather(tensor.tolist()))

            def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
                gathered = ranks.gather(obj)
                return gathered if ranks.rank == dst else None

            def barrier(self) -> None:
                ranks.gather(None)

        with one_line("lm-evaluation-harness could not run the tasks"):
            outcome = lm_eval.simple_evaluate(
                model=Shared(
                    pretrained=model,
                    tokenizer=tokenizer,
                    batch_size=batch_size,
                    add_bos_token=special,
                ),
                tasks=manager.match_tasks(list(names)),
                num_fewshot=num_fewshot,
                task_manager=manager,
                log_samples=False,
            )
    return ranks.from_leader(lambda: _figures(outcome))


def _figures(outcome: Any) -> dict[str, dict[str, float]]:
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in metrics.items()
            if "," in metric and isinstance(value, (int, float))
        }
        for task, metrics in outcome["results"].items()
    }


@contextmanager
def _harness() -> Iterator[None]:
    """The harness, when it is there, without its log; what it prints goes to standard error.

    Its bars show on a terminal only.
    """
    try:
        import lm_eval
    except ImportError:
        raise BesaError("--tasks needs lm-evaluation-harness: pip install 'besa[eval]'") from None
    logger = logging.getLogger(lm_eval.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with redirect_stdout(sys.stderr), redirect_stderr(bars):
            yield
    finally:
        logger.setLevel(level)
