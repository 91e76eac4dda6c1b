"""The work of `besa prune`, phase by phase, from shapes and settings.

>>> from besa.planning.shapes import LinearShape
>>> block = BlockShape((LinearShape("up", 1, 64, 16), LinearShape("down", 1, 16, 64)), 2048)
>>> setting = Setting(PruneConfig(out="pruned", method="wanda"), 16, 8, 16, 2, 4, False)
>>> phases = block_work(block, Attention(0, 0, 0), setting, index=0)
>>> phases["statistics"].products == forward_flops(block, Attention(0, 0, 0), 128, 16)
True

L is how many weights of a block are pruned, P how many numbers it has, F(n) the operations of a
forward pass of n tokens. What a step moves of each weight was counted in the code that does it.
"""

from __future__ import annotations

import math

from besa.planning.block_costs import forward_flops, kept_activations, partial_flops
from besa.planning.prune_memory import Setting
from besa.planning.shapes import Attention, BlockShape
from besa.planning.work import Work
from besa.pruning.config import PruneConfig
from besa.pruning.guard import FIRST, STEPS, held_out_of

# Bytes that are read and written for each pruned weight, whatever it is stored in:
_PUT = 24  # masked, rounded to the stored dtype, and converted for the block that runs
_RATES = 31  # by a step that learns rates: masked twice, and its gradient added up by buckets
_CHOICES = 120  # by a step that learns N:M: the groups compared, masked twice, moved
_ADAM = 45  # by a step that learns weights: gradients masked, Adam's two moments
_RECORD = 24  # counting zeros by row

# Operations on tensors, whatever their size, for each linear and pass of a batch.
_LAUNCHES = 20
_BACKWARD = 7  # times as many with gradients, as well as time for what is no product

# Of a forward pass, what the way to the first linears takes at least: norms, and gathering inputs.
_LEAST_WAY = 0.2

# ADMM: products of a matrix [rows, cols] with [cols, cols].
_ADMM_PRODUCTS = 20 + 5


def block_work(
    block: BlockShape, attention: Attention, setting: Setting, index: int
) -> dict[str, Work]:
    """The work on one block, by phase.

    - load: P numbers read, checked and converted;
    - statistics, teacher, hand on: F(tokens) each;
    - masks: what the method does (`_masks`);
    - update: least squares (`_solved`) and learned weights (`_learned`), each judged on what is
      held out, F(held out);
    - compare: errors of Wanda's masks and of the chosen ones, F(tokens / 8) each;
    - write: P numbers compared, written and digested, and zeros counted.

    Args:
        index: of the block: the first ones try more steps.
    """
    config, pruned = setting.config, block.prunable
    whole, stored, computed = block.parameters, setting.stored, setting.computed
    held_out = held_out_of(config) * setting.seqlen
    put = Work(moved=_PUT * pruned, launches=8 * len(block.pruned))
    part = _forward(block, attention, setting, max(setting.batch, setting.tokens / 8))
    phases = {
        "load": Work(moved=whole * (2 * stored + computed), files=whole * stored),
        "statistics": _forward(block, attention, setting, setting.tokens)
        + Work(moved=12.0 * setting.tokens * sum(x.cols * x.uses for x in block.pruned)),
        "masks": _masks(block, attention, setting) if pruned else Work(),
    }
    if config.method == "sparsegpt":
        squares = sum(2.0 * setting.tokens * x.uses * x.cols**2 for x in block.pruned)
        phases["statistics"] += Work(products=squares)
    if config.teacher == "dense":
        phases["teacher"] = _forward(block, attention, setting, setting.tokens)
    kind = config.update or "none"
    if kind != "none" and pruned:
        update = Work()
        judged = put + _forward(block, attention, setting, held_out)
        masks = 2 if config.method == "besa" and config.pattern.m and held_out else 1
        if kind in ("admm", "obs", "auto"):
            update += _solved(block, attention, setting, kind) * masks
        if held_out and kind in ("auto", "learn"):
            steps = len(STEPS) if index < FIRST else 1
            update += _learned(block, attention, setting) * steps
            update += judged * (masks * (2 if kind == "auto" else 1) + steps)
        phases["update"] = update
    compare = part + put
    if config.method != "wanda" and pruned:
        compare = compare * 2 + Work(sorted=_sorted(config, pruned), moved=16.0 * pruned)
    phases["compare"] = compare
    phases["hand on"] = _forward(block, attention, setting, setting.tokens)
    phases["write"] = Work(moved=whole * stored * 4 + _RECORD * pruned, files=3.0 * whole * stored)
    return phases


def around_work(others: int, setting: Setting) -> Work:
    """What belongs to no block is copied: `others` numbers read, checked, written and digested."""
    return Work(moved=others * setting.stored * 2.0, files=others * setting.stored * 3.0)


def passes(setting: Setting, blocks: int) -> tuple[float, float]:
    """How often all tokens go through all blocks, forward, and how often backward as well."""
    config = setting.config
    forward = 2.0 + (config.teacher == "dense") + (2 if config.method != "wanda" else 1) / 8
    backward = float(config.epochs) if config.method == "besa" else 0.0
    seen = 1 - held_out_of(config) / setting.samples
    if held_out_of(config) and config.update in ("auto", "learn"):
        first = min(FIRST, blocks)
        steps = (len(STEPS) * first + blocks - first) / blocks
        backward += steps
        forward += (1 - seen) * (steps + 2)
    if config.update not in ("none", "learn"):
        forward += 4 * seen  # up to each level, in the pruned and in the dense block
    return forward + backward * seen, backward * seen


def _forward(
    block: BlockShape, attention: Attention, setting: Setting, tokens: float, grad: bool = False
) -> Work:
    """A pass of so many tokens; with gradients its backward pass, too, of twice the products."""
    batches = math.ceil(tokens / setting.batch)
    kept = kept_activations(block, attention, tokens, setting.seqlen) * setting.computed
    # Of experts, those that a batch reaches are computed one by one.
    used = sum(max(1.0, x.groups * min(1.0, x.share * setting.batch)) for x in block.linears)
    launches = _LAUNCHES * batches * used
    times = _BACKWARD if grad else 1.0
    return Work(
        products=(3 if grad else 1) * forward_flops(block, attention, tokens, setting.seqlen),
        moved=2.0 * kept * times,
        launches=launches * times,
    )


def _steps(setting: Setting) -> int:
    seen = setting.samples - held_out_of(setting.config)
    return math.ceil(seen * setting.seqlen / setting.batch)


def _sorted(config: PruneConfig, pruned: int) -> float:
    """Numbers that a choice of the lowest scores sorts; N:M compares neighbours instead."""
    return 0.0 if config.pattern.m else float(pruned)


def _masks(block: BlockShape, attention: Attention, setting: Setting) -> Work:
    """Scores of L weights, and by the method:

    - magnitude, wanda: L numbers sorted;
    - besa: the same twice, for ranks and masks, and for each epoch a forward and a backward pass
      of what is not held out, with masks made anew for every batch;
    - sparsegpt: 4/3 cols^3 for the factors of each matrix, rows cols^2 to make up for its zeros.
    """
    config, pruned = setting.config, block.prunable
    work = Work(sorted=_sorted(config, pruned), moved=20.0 * pruned)
    if config.method == "sparsegpt":
        matrices = block.pruned
        return work + Work(
            products=sum(float(x.groups * x.rows * x.cols**2) for x in matrices),
            factors=sum(4 / 3 * x.groups * x.cols**3 for x in matrices),
            moved=sum(800.0 * x.size for x in matrices),
            launches=sum(8.0 * x.groups * x.cols for x in matrices),
        )
    if config.method == "besa":
        each = _CHOICES if config.pattern.m else _RATES
        seen = setting.samples - held_out_of(config)
        step = Work(moved=float(each * pruned), launches=60.0) * _steps(setting)
        epoch = _forward(block, attention, setting, seen * setting.seqlen, grad=True) + step
        work += epoch * config.epochs + Work(sorted=_sorted(config, pruned))
    return work


def _learned(block: BlockShape, attention: Attention, setting: Setting) -> Work:
    """Weights learned once: a forward and a backward pass, and Adam for every batch."""
    seen = setting.samples - held_out_of(setting.config)
    step = Work(moved=float(_ADAM * block.prunable), launches=30.0)
    epoch = _forward(block, attention, setting, seen * setting.seqlen, grad=True)
    return epoch + step * _steps(setting) + Work(moved=40.0 * block.prunable)


def _solved(block: BlockShape, attention: Attention, setting: Setting, kind: str) -> Work:
    """Least squares for each matrix, level by level.

    - Gram matrices: 2 tokens cols^2 for an input's own products, and as many for those with the
      dense one; linears that read the same share them, experts have their own alone;
    - the way to each level's input, in the pruned block and in the dense one;
    - the aim: cols^3 for a factor and its use, 4 rows cols^2;
    - ADMM: cols^3 for an inverse, 25 products of 2 rows cols^2; OBS: 4/3 cols^3, rows cols^2.
    """
    config = setting.config
    dense = config.teacher == "dense"
    tokens = (setting.samples - held_out_of(config)) * setting.seqlen
    whole = _forward(block, attention, setting, tokens)
    ways = [
        whole * max(part / whole.products, _LEAST_WAY)
        for part in partial_flops(block, attention, tokens, setting.seqlen)
    ]
    work = Work()
    for level, way in zip(block.levels, ways, strict=True):
        matrices = [x for x in level if x.pruned]
        if not matrices:
            continue
        first = matrices[0]
        shared = first.share < 1 or not dense
        grams = 2.0 * tokens * first.uses * first.cols**2 * (1 if shared else 2)
        work += way * (2 if dense else 1) + Work(products=grams)
        for x in matrices:
            square, cube = float(x.rows * x.cols**2), float(x.cols**3)
            aim = (cube / 3, 4 * square) if dense and x.share == 1 else (0.0, 0.0)
            admm = (cube, 2 * _ADMM_PRODUCTS * square)
            solve = (4 / 3 * cube, square) if kind == "obs" else admm
            work += Work(
                factors=x.groups * (aim[0] + solve[0]),
                products=x.groups * (aim[1] + solve[1]),
                moved=x.groups * (500.0 * x.rows * x.cols + 40.0 * x.cols**2),
                launches=150.0 * x.groups,
            )
    return work
