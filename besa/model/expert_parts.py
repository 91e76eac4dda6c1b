"""Which stored tensors a mixture's stacked experts are made of, and which rows are whose.

transformers holds the experts of a layer as one parameter [experts, out, in]. Files have it in the
same form, or a tensor for each expert, or for its gate and its projection up apart; transformers
stacks and joins them while it loads. What it does to the rows is found by letting it do the same to
the rows' numbers, for any family alike.

>>> from besa.model.checkpoint import Checkpoint
>>> checkpoint = Checkpoint.open("path/to/mixture")
>>> name = "model.layers.0.mlp.experts.gate_up_proj"
>>> experts = Linear("experts.gate_up_proj", "experts.gate_up_proj", 4, 32, 32, False)
>>> parts = parts_of({name: experts}, checkpoint.files, checkpoint.model, checkpoint.conversions)
>>> [(part.key, part.rows[0].item()) for part in parts[name][:3]]
[('model.layers.0.mlp.experts.0.gate_proj.weight', 0), ('...0.up_proj.weight', 16), ...]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, dot_natural_key

from besa.model.blocks import Linear
from besa.model.layout import Layout
from besa.model.skeleton import all_targets_of, by_source_pattern, renamings_and_converters

# What stands for the columns while rows are counted: fewer than any weight has rows.
_COLS = 2


@dataclass(frozen=True)
class Part:
    """A stored tensor that is all or some of the rows of a stacked weight.

    Attributes:
        key: its stored name.
        layout: how the file holds it.
        rows: int64 [layout.rows], for each of its rows the row of the stacked weight
            [experts * out, in] that it becomes.
    """

    key: str
    layout: Layout
    rows: Tensor


def stack_of(linear: Linear) -> Layout:
    """How the model holds experts that are stacked."""
    return Layout(linear.groups * linear.rows, linear.cols, linear.transposed, linear.groups)


def parts_of(
    stacked: Mapping[str, Linear], keys: Iterable[str], model: nn.Module, conversions: list[Any]
) -> dict[str, tuple[Part, ...] | None]:
    """The stored tensors of each stacked weight, in the order of their first rows.

    Args:
        stacked: the weights [experts, out, in], by their names in the model.
        keys: the names of stored tensors.
        conversions: those that transformers makes when it loads the model.

    Returns:
        None for a weight whose stored tensors are not its rows, or that has none.
    """
    by_target: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    known: set[str] = set()
    for key, (names, pattern) in all_targets_of(keys, model, conversions).items():
        for name in names:
            if name in stacked:
                by_target[name][pattern].append(key)
                known |= {name} if len(names) == 1 else set()
    converters = by_source_pattern(renamings_and_converters(conversions)[1])
    found: dict[str, tuple[Part, ...] | None] = {}
    for name, linear in stacked.items():
        sources = by_target[name]
        whole = sources.get(None, [])
        if name not in known:
            found[name] = None
        elif len(sources) == len(whole) == 1:
            layout = stack_of(linear)
            found[name] = (Part(whole[0], layout, torch.arange(layout.rows)),)
        elif whole:
            found[name] = None
        else:
            converter = converters[next(filter(None, sources))]
            ordered = {
                pattern: sorted(sources[pattern], key=dot_natural_key)
                for pattern in converter.source_patterns
                if pattern in sources
            }
            found[name] = _joined(name, stack_of(linear), converter, ordered, model)
    return found


def _joined(
    name: str,
    whole: Layout,
    converter: WeightConverter,
    sources: Mapping[str, list[str]],
    model: nn.Module,
) -> tuple[Part, ...] | None:
    """The parts that a converter makes a stacked weight of, if it only moves rows about."""
    keys = [key for group in sources.values() for key in group]
    each, rest = divmod(whole.rows, len(keys))
    if rest:
        return None
    numbers = torch.arange(whole.rows).split(each)
    target = replace(whole, cols=_COLS)
    for groups, transposed in product((None, whole.groups), (False, True)):
        if each % (groups or 1):
            continue
        layout = Layout(each, _COLS, transposed, groups)
        counted = iter([layout.stored(part[:, None].expand(-1, _COLS)) for part in numbers])
        tensors = {pattern: [next(counted) for _ in group] for pattern, group in sources.items()}
        made = _converted(converter, name, tensors, model)
        if made is None or made.shape != target.shape:
            continue
        order = target.matrix(made)
        if not order.eq(order[:, :1]).all():
            return None
        # Which stored row each row is, and so of each stored row which it becomes.
        order = order[:, 0]
        if not order.sort().values.equal(torch.cat(numbers)):
            return None
        places = order.argsort().split(each)
        parts = [
            Part(key, replace(layout, cols=whole.cols), rows)
            for key, rows in zip(keys, places, strict=True)
        ]
        return tuple(sorted(parts, key=lambda part: int(part.rows[0])))
    return None


def _converted(
    converter: WeightConverter,
    name: str,
    tensors: Mapping[str, list[Tensor]],
    model: nn.Module,
) -> Tensor | None:
    """What a converter makes of tensors, by the patterns of their names; None if it cannot."""
    own: Any = deepcopy(converter)
    for pattern, group in tensors.items():
        for number, tensor in enumerate(group):
            own.add_tensor(name, f"{pattern} {number}", pattern, tensor)
    try:
        (made,) = own.convert(name, model=model, config=model.config).values()
    except Exception:  # noqa: BLE001 - what another form raises is the operations' own affair
        return None
    return made[0] if isinstance(made, list) else made
