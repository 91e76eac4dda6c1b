"""Writes a rotated copy of a model, which gives the same logits: `besa prune --rotate`.

>>> windows = torch.randint(257, (2, 16))
>>> rotate(Checkpoint.open("path/to/model"), windows, Path("rotated"), steps=2)
'the residual stream and the values of each head were rotated'
>>> sorted(path.name for path in Path("rotated").glob("*.json"))[0]
'config.json'

Residual stream and values are rotated where that leaves the function alone: random rotations are
tried first, and the logits compared. A model that uses its embedding as its head would get a head
of its own from the former, and grow; that is done only if it is asked for.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from besa.model.checkpoint import Checkpoint
from besa.model.loading import load_model
from besa.rotation.apply import (
    fold_gains,
    random_rotation,
    rotate_heads,
    rotate_stream,
    values_in,
)
from besa.rotation.learn import STEPS, learn_rotations, statistics_of
from besa.rotation.structure import Structure, structure_of
from besa.writing import writing

# Of the largest logit, by which float32 may change the others.
_TOLERANCE = 1e-3
_TOKENS = 64  # that the logits are compared on


def rotate(
    checkpoint: Checkpoint,
    windows: Tensor,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    untie: bool = False,
    steps: int = STEPS,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_written: Callable[[Path, str], None] = lambda path, words: None,
) -> str | None:
    """Learns rotations on some text and writes the rotated model; says what was rotated.

    The model is in memory as a whole, in float32.

    Args:
        checkpoint: the model.
        windows: token ids int64 [windows, tokens].
        out: the directory to write; not there yet.
        untie: rotate the stream of a model whose head is its embedding, too.
        on_step: is told of the steps done, and in all.
        on_written: may add to the directory, before it gets its name.

    Returns:
        A sentence for people; None if nothing can be rotated, and nothing was written.

    Raises:
        BesaError: the model cannot be loaded, or does not fit.
    """
    model = _loaded(checkpoint, device)
    windows = windows.to(model.device)
    probe = windows[:1, :_TOKENS]
    before = _logits(model, probe)
    structure = _with_heads_that_hold(model, structure_of(model), probe, before)
    if structure.sites and (untie or not _is_tied(model)):
        _untie(model)
        fold_gains(model, structure.sites)
        if not _stream_holds(model, structure, probe, before):
            model = _loaded(checkpoint, device)
            structure = replace(structure, sites=(), writers=())
    else:
        structure = replace(structure, sites=(), writers=())
    if not structure.sites and not structure.heads:
        return None

    found = learn_rotations(
        model, structure, statistics_of(model, structure, windows), steps, on_step
    )
    if found.stream is not None:
        rotate_stream(model, structure, found.stream)
    for heads, rotations in zip(structure.heads, found.heads, strict=True):
        rotate_heads(model, heads, rotations)
    if not _same(_logits(model, probe), before):
        return None
    parts = {
        "the residual stream": structure.sites,
        "the values of each head": structure.heads,
    }
    named = " and ".join(name for name, there in parts.items() if there)
    words = f"{named} {'were' if structure.heads else 'was'} rotated"
    partial = out.with_name(out.name + ".writing")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(out):
            partial.mkdir(parents=True)
            checkpoint.copy_companions(partial)
            try:
                model.to(checkpoint.dtype).save_pretrained(partial)
            except SafetensorError as error:  # it says no error's number
                raise OSError(errno.ENOSPC, str(error)) from None
            on_written(partial, words)
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return words


def _loaded(checkpoint: Checkpoint, device: torch.device | str) -> Any:
    """The model in float32, its experts by products that can be seen."""
    trust = checkpoint.trust_remote_code
    model = load_model(checkpoint.directory, "float32", device, trust).requires_grad_(False)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    return logits


def _same(logits: Tensor, before: Tensor) -> bool:
    return bool((logits - before).abs().max() <= _TOLERANCE * before.abs().max())


def _with_heads_that_hold(
    model: Any, structure: Structure, probe: Tensor, before: Tensor
) -> Structure:
    """The structure with those pairs of values and outputs that are such, by trying each kind."""
    holds: dict[tuple[str, str], bool] = {}
    kept = []
    for heads in structure.heads:
        kind = _kind(heads.value.name), _kind(heads.output.name)
        if kind not in holds:
            trial = random_rotation(heads.size, seed=0, groups=values_in(model, heads))
            rotate_heads(model, heads, trial)
            holds[kind] = _same(_logits(model, probe), before)
            rotate_heads(model, heads, trial.mT)
        if holds[kind]:
            kept.append(heads)
    return replace(structure, heads=tuple(kept))


def _kind(name: str) -> str:
    """A name without its block's index."""
    return re.sub(r"\.\d+\.", ".", name, count=1)


def _stream_holds(model: Any, structure: Structure, probe: Tensor, before: Tensor) -> bool:
    """Whether a random rotation of the stream leaves the logits alone; it is undone if so."""
    if not _same(_logits(model, probe), before):
        return False
    trial = random_rotation(structure.width, seed=0)
    rotate_stream(model, structure, trial)
    if not _same(_logits(model, probe), before):
        return False
    rotate_stream(model, structure, trial.T)
    return True


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _untie(model: Any) -> None:
    """Gives the head a weight of its own."""
    if _is_tied(model):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
