"""Evaluates several models on the same texts, side by side.

>>> config = EvalConfig(seqlen=128, limit=4)
>>> for result in evaluate(["path/to/model", "path/to/pruned"], config):
...     print(result.model, result.perplexity.perplexity, "±", result.perplexity.standard_error)
path/to/model ... ± ...
path/to/pruned ... ± ...

    torchrun --nproc-per-node 2 -m besa eval MODEL PRUNED

Several processes share the windows and the tasks' questions; each holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from besa.data.beginning import bos_token
from besa.data.stream import separator_of, stream_of
from besa.data.texts import has_columns, window_cap
from besa.data.windows import evaluation_windows
from besa.errors import BesaError
from besa.evaluation import tasks
from besa.evaluation.config import EvalConfig
from besa.evaluation.perplexity import Perplexity, paired, window_losses
from besa.formats.experts import SparseExperts
from besa.formats.module import SparseLinear
from besa.model import loading
from besa.model.files import model_directory
from besa.processes.ranks import ALONE, Ranks, joined

# A model minds that windows lack its beginning token if that costs it more than so many nats a
# token on the first windows. What the token itself takes from a window is far less.
_MINDS = 0.05
_FIRST_WINDOWS = 8


@dataclass(frozen=True)
class BosCost:
    """The loss of the first windows, each after a beginning token and as they come.

    Attributes:
        with_bos, without: in nats a token.
        windows: how many there were.
    """

    with_bos: float
    without: float
    windows: int

    @property
    def minds(self) -> bool:
        """Whether a model would be measured wrongly without the token."""
        return self.without - self.with_bos > _MINDS


@dataclass(frozen=True)
class Result:
    """One model on one text.

    Attributes:
        difference: `paired` against the first model; None for that one, and where the two
            tokenizers cut the text into different windows.
        sparsity: the share of zeros in the weights, where the model has a `besa.json`.
        tasks: {task: {metric: value}} where tasks were asked for; the same on each text.
        bos: whether each window began with the tokenizer's beginning token.
        bos_cost: what its absence costs the first model; None where that was not measured.
        tasks_bos: whether the tasks' texts began with it; None without tasks.
        separator: what stood between the text's documents, "eos" or "blank-line".
    """

    model: str
    text: str
    perplexity: Perplexity
    difference: tuple[float, float] | None
    sparsity: float | None
    dtype: str
    device: str
    tasks: dict[str, dict[str, float]] | None
    bos: bool = False
    bos_cost: BosCost | None = None
    tasks_bos: bool | None = None
    separator: str = "blank-line"


def evaluate(
    models: Sequence[str],
    config: EvalConfig,
    progress: Callable[[str, str, int, int], None] | None = None,
) -> list[Result]:
    """Evaluates each model on each text; all that can be wrong is looked at before any work.

    Args:
        models: directories or hub ids; differences are against the first.
        progress: called with model, text, windows done and windows in all.

    Returns:
        Results by model, then by text, in the order given.

    Raises:
        BesaError: one of the models, texts, tasks or the device is not what it should be.
        PeerLostError: of processes that share the work, another one ended.
    """
    with joined() as ranks:
        return _evaluate(models, config, progress, ranks)


def _evaluate(
    models: Sequence[str],
    config: EvalConfig,
    progress: Callable[[str, str, int, int], None] | None,
    ranks: Ranks,
) -> list[Result]:
    device = loading.pick_device(ranks.device(config.device))
    directories = [model_directory(model) for model in models]
    trust = config.trust_remote_code
    seqlen = _common_seqlen(models, directories, config.seqlen, trust)
    manager = tasks.find(config.tasks, config.task_path) if config.tasks else None
    tokenizers = [loading.load_tokenizer(directory, trust) for directory in directories]
    tokens = [bos_token(config.bos, tokenizer) for tokenizer in tokenizers]
    windows = [_windows(*own, config, seqlen) for own in zip(tokenizers, tokens, strict=True)]
    with_bos = tokens[0] is not None
    plain, cost = windows, None
    if config.bos == "auto":  # what the first model does not mind, or its tokenizer does not do
        plain = [
            own if token is None else _windows(tokenizer, None, config, seqlen)
            for tokenizer, token, own in zip(tokenizers, tokens, windows, strict=True)
        ]

    results: list[list[Result]] = []
    for index, (name, directory, tokenizer) in enumerate(
        zip(models, directories, tokenizers, strict=True)
    ):
        model = loading.load_model(directory, config.dtype, device, trust)
        if index == 0 and config.bos == "auto" and with_bos:
            with loading.fitting_in_memory(name, "lower --batch-size or --seqlen"):
                cost = bos_cost(model, windows[0][0], plain[0][0], config.batch_size, ranks)
            with_bos = cost.minds
        windows = windows if with_bos else plain
        own = windows[index]
        measured = []
        for text, batch in zip(config.texts, own, strict=True):
            report = partial(progress, name, text) if progress else None
            with loading.fitting_in_memory(name, "lower --batch-size or --seqlen"):
                losses = window_losses(model, batch, config.batch_size, report, ranks)
            measured.append(Perplexity.of(losses, seqlen))
        scores = tasks_bos = None
        if manager is not None:
            scores = tasks.run(
                model,
                tokenizer,
                config.tasks,
                manager,
                config.num_fewshot,
                config.batch_size,
                config.bos,
                ranks,
            )
            tasks_bos = tokens[index] is not None
        zeros = sparsity(model) if (directory / "besa.json").is_file() else None
        of_model = []
        for index, (text, perplexity) in enumerate(zip(config.texts, measured, strict=True)):
            difference = None
            if results and torch.equal(own[index], windows[0][index]):
                difference = paired(perplexity.losses, results[0][index].perplexity.losses)
            of_model.append(
                Result(
                    model=name,
                    text=text,
                    perplexity=perplexity,
                    difference=difference,
                    sparsity=zeros,
                    dtype=str(model.dtype).removeprefix("torch."),
                    device=device.type if ranks.size > 1 else str(device),
                    tasks=scores,
                    bos=with_bos,
                    bos_cost=cost,
                    tasks_bos=tasks_bos,
                    separator=separator_of(config.separator, text, "test", tokenizer),
                )
            )
        results.append(of_model)
        del model  # before the next one is loaded
    return [result for of_model in results for result in of_model]


def _common_seqlen(
    models: Sequence[str], directories: list[Path], asked: int | None, trust_remote_code: bool
) -> int:
    """One length for all, so that the perplexities can be compared."""
    seqlen = asked or 2048
    for name, directory in zip(models, directories, strict=True):
        most = loading.max_positions(directory, trust_remote_code) or seqlen
        if seqlen > most and asked:
            raise BesaError(f"{name} takes {most} tokens at once: lower --seqlen from {asked}")
        seqlen = min(seqlen, most)
    return seqlen


def _windows(tokenizer: Any, bos: int | None, config: EvalConfig, seqlen: int) -> list[Tensor]:
    """The windows of each text, each begun with `bos` if there is one."""
    return [windows_of(tokenizer, text, seqlen, config, bos) for text in config.texts]


def windows_of(
    tokenizer: Any, text: str, seqlen: int, config: EvalConfig, bos: int | None
) -> Tensor:
    """The windows of a text, each begun with `bos` if there is one: int64 [windows, seqlen].

    Raises:
        BesaError: the text cannot be read, or is shorter than a window.
    """
    counts = [count for count in (config.limit, window_cap(text)) if count is not None]
    stream = stream_of(
        text,
        "test",
        tokenizer,
        column=config.column if has_columns(text) else None,
        separator=config.separator,
        bos=bos,
        limit=min(counts) * seqlen if counts else None,
    )
    try:
        windows = evaluation_windows(stream, seqlen, bos)
    except BesaError as error:
        raise BesaError(f"{text}: {error}") from None
    return windows[: min(counts)] if counts else windows


def bos_cost(
    model: nn.Module, begun: Tensor, plain: Tensor, batch_size: int, ranks: Ranks = ALONE
) -> BosCost:
    """What a model loses on the first windows, begun with a token and as they come."""
    both = begun[:_FIRST_WINDOWS], plain[:_FIRST_WINDOWS]
    losses = [window_losses(model, some, batch_size, ranks=ranks) for some in both]
    with_bos, without = (float(found.mean()) for found in losses)
    return BosCost(with_bos, without, len(both[0]))


def sparsity(model: nn.Module) -> float:
    """The share of zeros in the model's matrices, the embeddings and the head left out."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()  # type: ignore[operator]
    left_out = {id(module.weight) for module in [*embeddings, head] if module is not None}
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in left_out]
    packed = [m.packed for m in model.modules() if isinstance(m, SparseLinear)]
    packed += [w for m in model.modules() if isinstance(m, SparseExperts) for w in m.packed]
    nonzeros = sum(int(torch.count_nonzero(p)) for p in matrices)
    nonzeros += sum(weight.nonzeros for weight in packed)
    weights = sum(p.numel() for p in matrices) + sum(weight.shape.numel() for weight in packed)
    return (weights - nonzeros) / max(1, weights)
