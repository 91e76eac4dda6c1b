"""Perplexity by the field's protocol, with its standard error, for checkpoints side by side.

The text is cut into windows that do not overlap; of each window the model predicts every token
but the first, and sees nothing outside the window. With ℓ_i the mean negative log-likelihood of
window i (nats a token) and n windows,

    perplexity     = exp(ℓ̄),  ℓ̄ = Σ ℓ_i / n
    standard error = exp(ℓ̄) · s / √n,  s² = Σ (ℓ_i − ℓ̄)² / (n − 1)     (delta method)

Two models that read the same windows are compared window by window (`paired`): how hard a window
is falls out of the difference, so its standard error is far below that of either perplexity.

    from besa.evaluation.perplexity import EvalConfig, evaluate

    for result in evaluate(["path/to/dense", "path/to/pruned"], EvalConfig(seqlen=512)):
        print(result.model, result.perplexity.perplexity, result.perplexity.standard_error)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from besa.data.texts import documents_from, window_cap
from besa.data.windows import evaluation_windows, token_stream
from besa.errors import BesaError
from besa.evaluation import tasks
from besa.formats.module import SparseLinear
from besa.model import loading
from besa.model.files import model_directory

# Logits turned into float32 at a time: 64 MiB of them.
_LOGITS_AT_A_TIME = 1 << 24

# Called with windows done and windows in all.
Progress = Callable[[int, int], None]


@torch.inference_mode()
def window_losses(
    model: nn.Module, windows: Tensor, batch_size: int = 1, progress: Progress | None = None
) -> Tensor:
    """The mean negative log-likelihood of each window's tokens but the first.

    The logits are held in the model's dtype for one batch; the log-softmax is taken in float32,
    a bounded number of positions at a time.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        windows: int64 [n, seqlen], seqlen ≥ 2.
        batch_size: windows in one call of the model.
        progress: called with windows done and windows in all, first with none done.

    Returns:
        float64 [n] on the CPU, nats a token.

    Raises:
        BesaError: the windows hold tokens that the model does not know.
    """
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if int(windows.max()) >= rows:
        raise BesaError(f"the tokenizer gives tokens beyond the model's {rows}: it is another's")
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    if progress:
        progress(0, len(windows))
    for batch in windows.split(batch_size):
        tokens = batch.to(device)
        logits = model(input_ids=tokens, use_cache=False).logits
        losses += [_loss(own[:-1], window[1:]) for own, window in zip(logits, tokens, strict=True)]
        if progress:
            progress(len(losses), len(windows))
    return torch.stack(losses).cpu()


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats, float64 []; logits [positions, vocabulary]."""
    rows = max(1, _LOGITS_AT_A_TIME // logits.shape[-1])
    parts = [
        F.cross_entropy(part.float(), wanted, reduction="none").double().sum()
        for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(parts).sum() / len(targets)


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and its conditions.

    Attributes:
        perplexity: exp of the mean loss; infinite or not a number for a model that is broken.
        standard_error: by the delta method from the windows' spread; NaN for a single window.
        tokens: how many tokens were predicted, windows × (seqlen − 1).
        windows: how many windows were read.
        seqlen: tokens in a window.
        losses: float64 [windows], nats a token.
    """

    perplexity: float
    standard_error: float
    tokens: int
    windows: int
    seqlen: int
    losses: Tensor = field(repr=False, compare=False)

    @classmethod
    def of(cls, losses: Tensor, seqlen: int) -> Perplexity:
        """From the losses of the windows, float64 [n]."""
        mean, error = _mean(losses)
        perplexity = math.exp(mean) if mean < 709 else mean * math.inf  # exp overflows; NaN stays
        n = len(losses)
        return cls(perplexity, perplexity * error, n * (seqlen - 1), n, seqlen, losses)


def paired(losses: Tensor, reference: Tensor) -> tuple[float, float]:
    """How much worse than the reference on the same windows, in nats a token.

    Args:
        losses: float64 [n], the mean negative log-likelihood of each window.
        reference: float64 [n], the same of the model to compare with.

    Returns:
        The mean of `losses - reference` (positive: the reference predicts better; exp of it is
        the ratio of the perplexities) and its standard error, NaN for a single window.
    """
    return _mean(losses - reference)


def _mean(values: Tensor) -> tuple[float, float]:
    error = values.std(correction=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def sparsity(model: nn.Module) -> float:
    """The share of zeros in the model's matrices, the embeddings and the head left out."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()  # type: ignore[operator]
    left_out = {id(module.weight) for module in [*embeddings, head] if module is not None}
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in left_out]
    packed = [m.packed for m in model.modules() if isinstance(m, SparseLinear)]
    nonzeros = sum(int(torch.count_nonzero(p)) for p in matrices)
    nonzeros += sum(weight.values.numel() for weight in packed)
    weights = sum(p.numel() for p in matrices) + sum(weight.shape.numel() for weight in packed)
    return (weights - nonzeros) / max(1, weights)


@dataclass(frozen=True)
class EvalConfig:
    """The settings of `besa eval`.

    Attributes:
        texts: sources as `besa.data.texts` knows them, read at their `test` split.
        seqlen: tokens in a window; None for 2048, or less where a model takes fewer.
        batch_size: windows in one call of the model.
        dtype: one of `besa.model.loading.DTYPES`.
        device: None for the GPU if there is one, else the CPU.
        limit: only the first so many windows of each text.
        tasks: names of lm-evaluation-harness, globs allowed.
        num_fewshot: examples before each question; None for each task's own default.
        task_path: a directory with task definitions of one's own.
    """

    texts: tuple[str, ...] = ("builtin:test",)
    seqlen: int | None = None
    batch_size: int = 1
    dtype: str = "auto"
    device: str | None = None
    limit: int | None = None
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    task_path: Path | None = None

    def __post_init__(self) -> None:
        if not self.texts:
            raise BesaError("no text to evaluate on: name at least one")
        for name, least in (("seqlen", 2), ("batch_size", 1), ("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BesaError(f"--{name.replace('_', '-')} is {value}: at least {least}")
        if self.dtype not in loading.DTYPES:
            raise BesaError(f"no dtype {self.dtype}: choose one of {', '.join(loading.DTYPES)}")
        if not self.tasks and (self.num_fewshot is not None or self.task_path is not None):
            raise BesaError("--num-fewshot and --task-path say how to run --tasks: name some")


@dataclass(frozen=True)
class Result:
    """One model on one text.

    Attributes:
        difference: `paired` against the first model; None for that one, and where the two
            tokenizers cut the text into different windows.
        sparsity: the share of zeros in the weights, where the model has a `besa.json`.
        tasks: {task: {metric: value}} where tasks were asked for; the same on each text.
    """

    model: str
    text: str
    perplexity: Perplexity
    difference: tuple[float, float] | None
    sparsity: float | None
    dtype: str
    device: str
    tasks: dict[str, dict[str, float]] | None


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
    """
    device = loading.pick_device(config.device)
    directories = [model_directory(model) for model in models]
    seqlen = _common_seqlen(models, directories, config.seqlen)
    manager = tasks.find(config.tasks, config.task_path) if config.tasks else None
    tokenizers = [loading.load_tokenizer(directory) for directory in directories]
    windows = [
        [_windows(t, text, seqlen, config.limit) for text in config.texts] for t in tokenizers
    ]

    results: list[Result] = []
    for name, directory, tokenizer, own in zip(
        models, directories, tokenizers, windows, strict=True
    ):
        model = loading.load_model(directory, config.dtype, device)
        measured = []
        for text, batch in zip(config.texts, own, strict=True):
            report = partial(progress, name, text) if progress else None
            with loading.fitting_in_memory(name, "lower --batch-size or --seqlen"):
                measured.append(window_losses(model, batch, config.batch_size, report))
        scores = None
        if manager is not None:
            scores = tasks.run(
                model, tokenizer, config.tasks, manager, config.num_fewshot, config.batch_size
            )
        zeros = sparsity(model) if (directory / "besa.json").is_file() else None
        for index, (text, losses) in enumerate(zip(config.texts, measured, strict=True)):
            # The first model's results lie at the front, in the order of the texts.
            is_first = len(results) < len(config.texts)
            same_windows = torch.equal(own[index], windows[0][index])
            results.append(
                Result(
                    model=name,
                    text=text,
                    perplexity=Perplexity.of(losses, seqlen),
                    difference=None
                    if is_first or not same_windows
                    else paired(losses, results[index].perplexity.losses),
                    sparsity=zeros,
                    dtype=str(model.dtype).removeprefix("torch."),
                    device=str(device),
                    tasks=scores,
                )
            )
        del model
    return results


def _common_seqlen(models: Sequence[str], directories: list[Path], asked: int | None) -> int:
    """One length for all, so that the perplexities can be compared."""
    seqlen = asked or 2048
    for name, directory in zip(models, directories, strict=True):
        most = loading.max_positions(directory) or seqlen
        if seqlen > most and asked:
            raise BesaError(f"{name} takes {most} tokens at once: lower --seqlen from {asked}")
        seqlen = min(seqlen, most)
    return seqlen


def _windows(tokenizer: Any, text: str, seqlen: int, limit: int | None) -> Tensor:
    counts = [count for count in (limit, window_cap(text)) if count is not None]
    tokens = min(counts) * seqlen if counts else None
    try:
        return evaluation_windows(token_stream(tokenizer, documents_from(text), tokens), seqlen)
    except BesaError as error:
        raise BesaError(str(error) if text in str(error) else f"{text}: {error}") from None
