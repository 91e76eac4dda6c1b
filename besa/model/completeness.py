"""Whether a checkpoint has what its config.json asks for, known from the headers.

A tensor that is missing would be random in what transformers loads, and a surplus one is a sign
that the config is of another model. Both are named all at once, before any work.

>>> from besa.model.checkpoint import Checkpoint
>>> checkpoint = Checkpoint.open("path/to/model")
>>> check_complete(checkpoint.directory, checkpoint.model, checkpoint.files, [], shapes=None)
"""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from besa.errors import BesaError, BesaWarning
from besa.model.files import not_of_floats
from besa.model.skeleton import all_targets_of, tied_names

# Buffers of old checkpoints that transformers computes by now, and drops without a word.
_OLD_BUFFERS = (
    r"rotary_emb\.inv_freq$",
    r"(^|\.)position_ids$",
    r"attn\.(masked_)?bias$",
)


def check_complete(
    directory: Path,
    model: nn.Module,
    files: Iterable[str],
    conversions: list[Any],
    shapes: Mapping[str, tuple[int, ...]] | None,
    whole_numbers: Mapping[str, str] | None = None,
) -> None:
    """Compares the stored tensors with the skeleton of the model; warns of surplus ones.

    Args:
        files: the names of the stored tensors.
        shapes: of theirs, as far as they are the model's; None where none are, which leaves the
            names.
        whole_numbers: the stored tensors that are no floats, and what each is.

    Raises:
        BesaError: names all tensors that are missing, or that have another shape; or one that is of
            whole numbers, where the model has floats.
    """
    tensors = model.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    known, whole_kinds = shapes or {}, whole_numbers or {}
    whole: dict[str, str] = {}  # the stored tensor that a parameter is
    parts: dict[str, int] = defaultdict(int)  # the numbers stored for those that are put together
    surplus = []
    for key, (targets, converted) in all_targets_of(files, model, conversions).items():
        if not any(target in wanted for target in targets):
            surplus.append(key)
        elif key in whole_kinds and any(
            tensors[target].is_floating_point() for target in targets if target in wanted
        ):
            raise not_of_floats(directory, key, whole_kinds[key])
        elif converted:
            for target in targets:
                parts[target] += math.prod(known.get(key, wanted.get(target, ())))
        else:
            whole[targets[0]] = key
    misshapen = [n for n, key in whole.items() if known.get(key, wanted[n]) != wanted[n]]
    if misshapen:
        verb = "has" if len(misshapen) == 1 else "have"
        raise BesaError(
            f"{directory}: {_listed(misshapen)} {verb} another shape than config.json says"
        )
    tied = tied_names(model)
    optional = _expression(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    missing = [
        name
        for name in wanted
        if not {name, *tied.get(name, ())} & (whole.keys() | parts.keys())
        and not (optional and optional.search(name))
    ]
    if missing:
        raise BesaError(f"{directory} lacks {_weights(missing)}{_remedy(model, missing)}")
    partial = [n for n, size in parts.items() if n in wanted and size < math.prod(wanted[n])]
    if partial and shapes:
        raise BesaError(f"{directory} lacks a part of {_listed(partial)}: download the model again")
    passed = (*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OLD_BUFFERS)
    expected = _expression(passed)
    surplus = [key for key in surplus if not (expected and expected.search(key))]
    if surplus:
        warnings.warn(
            f"{directory} has tensors that a {type(model).__name__} has no place for, and they are "
            f"copied as they are: {_listed(surplus)}",
            BesaWarning,
            stacklevel=2,
        )


def _expression(patterns: Iterable[str]) -> re.Pattern[str] | None:
    alternatives = [f"(?:{pattern})" for pattern in patterns]
    return re.compile("|".join(alternatives)) if alternatives else None


def _weights(names: Sequence[str]) -> str:
    one = len(names) == 1
    return f"the weight {names[0]}" if one else f"{len(names)} weights: {_listed(names)}"


def _listed(names: Iterable[str]) -> str:
    """Names in one line, those that differ by their numbers alone as one."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[re.sub(r"\d+", "*", name)].append(name)
    return ", ".join(
        group[0] if len(group) == 1 else f"{group[0]} and {len(group) - 1} alike"
        for group in alike.values()
    )


def _remedy(model: nn.Module, missing: Sequence[str]) -> str:
    """What to do where the head alone is missing, as after a merge of a tied model."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    if head is None or list(missing) != names:
        return ": download the model again"
    return ': if the embedding is its head, say "tie_word_embeddings": true in config.json'
