"""The memory of `besa prune`, moment by moment, from shapes and settings.

>>> from besa.planning.parts import peak_of
>>> from besa.planning.shapes import LinearShape
>>> block = BlockShape((LinearShape("up", 1, 1024, 1024),), 2**20)
>>> setting = Setting(PruneConfig(out="pruned", method="wanda"), 32, 32, 32, 2, 4, False)
>>> peak_of(block_moments(block, Attention(0, 0, 0), setting).host).name
'choose'

A block exists twice: as it is stored, and as it computes. Once pruned weights are put into it, its
dense ones are still there, to go on from. L below is how many weights of the block are pruned, P
how many numbers it has, s and c are the bytes of a stored and of a computed number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from besa.data.samples import WINDOWS_PER_SAMPLE
from besa.planning.block_costs import kept_activations, transient_activations
from besa.planning.parts import Moment
from besa.planning.shapes import Attention, BlockShape, ModelShape
from besa.pruning.allocate import CANDIDATES
from besa.pruning.config import PruneConfig
from besa.pruning.guard import held_out_of
from besa.pruning.patterns import row_chunks

# What sorting a piece of a matrix holds at once: a copy in float32, its order in int64, and the
# sorted values, see `besa.pruning.patterns.row_chunks`.
_SORT_BYTES = 4 + 8 + 4
# See `text_bytes` and `text_tokens`.
_LOADING, _LOADED, _TOKEN_BYTES, _LEFT = 14, 10, 600, 0.4
_GENEROUS, _LETTERS, _BUILTIN_TOKENS = 1.8, 4, 220_000

_ON_GPU = 4  # times as many numbers are sorted at once there

# Of a row's logits [candidates]: themselves, two moments, gradient, softmax, sums and theirs.
_LOGITS = 8


@dataclass(frozen=True)
class Setting:
    """What of a run its memory depends on.

    Attributes:
        config: the settings.
        seqlen: tokens of a sample.
        samples: how many.
        batch: tokens that go through a block at once.
        stored, computed: bytes of a number in the files and in the computation.
        on_gpu: whether another device than the CPU computes.
    """

    config: PruneConfig
    seqlen: int
    samples: int
    batch: int
    stored: int
    computed: int
    on_gpu: bool

    @property
    def tokens(self) -> int:
        return self.samples * self.seqlen


@dataclass(frozen=True)
class BlockMoments:
    """The moments of a block: on the host, and on the device where that is another one."""

    host: list[Moment]
    device: list[Moment]


def stream_bytes(width: int, setting: Setting) -> dict[str, int]:
    """Of the activations between blocks, tokens * width * c for each stream.

    The pruned stream; with a dense teacher the dense one; and targets, as many as are learned from:
    all with a dense teacher or where the method learns, else an eighth.
    """
    each = setting.tokens * width * setting.computed
    dense = setting.config.teacher == "dense"
    targets = each if dense or setting.config.method == "besa" else each // 8
    return {"calibration streams": each * (2 if dense else 1) + targets}


def block_moments(block: BlockShape, attention: Attention, setting: Setting) -> BlockMoments:
    """The moments of one block's pruning, without what stays in memory all the time.

    Loaded: P s for the stored block, P c for the one that computes. After the first pruned weights
    are put there: L s more where the dtypes differ (the dense weights stay, to be masked anew), and
    L c more. Then, by moment:

    - choose: scores 4 L, masks L, and what the method learns or gathers (`_choosing`);
    - update: masks L, Gram matrices and factors of the largest matrix, new weights 4 L;
    - learn: masks L; what is best so far and what it began with, 4 L each; the weights, Adam's two
      moments and gradients, 16 L, or the activations of a batch, if these are more;
    - compare: masks and new weights, Wanda's scores 4 L and masks L beside those of other methods;
    - write: what was put, masks, the new weights, and P s as the file will have it.
    """
    config = setting.config
    pruned, whole = block.prunable, block.parameters
    stored, computed = setting.stored, setting.computed
    differ = stored != computed
    names = ("block as stored", "block that computes")
    loaded = {names[0]: whole * stored, names[1]: whole * computed}
    put = {
        names[0]: whole * stored + (pruned * stored if differ else 0),
        names[1]: whole * computed + pruned * computed,
    }
    if not differ and not setting.on_gpu:  # the pruned weights are the stored ones
        put[names[0]] = (whole - pruned) * stored
    activations = int(kept_activations(block, attention, setting.batch, setting.seqlen) * computed)
    passing = int(transient_activations(block, setting.batch) * computed)
    # What other methods give is compared with Wanda's masks.
    wanda = {"masks": 2 * pruned, "scores and sorting": _scores(block, setting)}
    judged = {} if config.method == "wanda" else wanda
    kind = config.update if pruned else "none"
    after = {**put, "masks": pruned} | ({"new weights": 4 * pruned} if kind != "none" else {})
    moments = [
        Moment("choose", {**loaded, **_choosing(block, setting, activations, passing)}),
        Moment("compare", {**after, "activations": passing, **judged}),
        Moment("write", {**after, "the file": whole * stored}),
    ]
    if kind not in ("none", "learn"):
        solving = {"least squares": _solving(block), "activations": passing}
        moments.append(Moment("update", {**after, **solving}))
    if kind in ("auto", "learn") and held_out_of(config):
        learning = {
            "new weights": 3 * 4 * pruned,
            "optimizer": 12 * pruned,
            "gradients and activations": max(4 * pruned, activations) + 8 * block.largest,
        }
        moments.append(Moment("learn", {**after, **learning}))
    if not setting.on_gpu:
        return BlockMoments(moments, [])
    return _divided(moments, block, setting)


def _divided(moments: list[Moment], block: BlockShape, setting: Setting) -> BlockMoments:
    """On a GPU: the host holds the stored block, the next one, and what is written."""
    ours = ("block as stored", "the file")
    ahead = {"next block, loaded ahead": block.parameters * setting.stored}
    host = [
        Moment(x.name, {**{n: v for n, v in x.parts.items() if n in ours}, **ahead})
        for x in moments
    ]
    device = [Moment(x.name, {n: v for n, v in x.parts.items() if n not in ours}) for x in moments]
    return BlockMoments(host, device)


def _choosing(
    block: BlockShape, setting: Setting, activations: int, passing: int
) -> dict[str, int]:
    """What a method holds while it chooses masks.

    - magnitude, wanda: scores 4 L and masks L, and a sorted piece;
    - besa: the same, buckets L, 32 bytes for each of a row's 100 candidate rates, a batch's
      activations, and a matrix with its gradient;
    - besa for N:M: importances and their gradients, 8 L, in place of the buckets;
    - sparsegpt: sum of 4 groups cols^2, new weights 4 L, two masks, and the factors of a matrix.
    """
    config, pruned = setting.config, block.prunable
    largest = block.largest
    method = config.method
    if method == "sparsegpt":
        hessians = sum(4 * x.groups * x.cols**2 for x in block.pruned)
        columns = max((x.cols for x in block.pruned), default=0)
        return {
            "statistics": hessians,
            "masks": 2 * pruned,
            "new weights": 4 * pruned,
            "least squares": 4 * (3 * columns**2 + 2 * largest),
            "activations": passing,
        }
    parts = {"scores and sorting": _scores(block, setting), "masks": pruned}
    if method != "besa":
        return parts
    if config.pattern.m:
        learned = {"what is learned": 4 * pruned}
        parts["gradients and activations"] = max(4 * pruned, activations) + 8 * largest
    else:
        rows = sum(x.groups * x.rows for x in block.pruned)
        if config.granularity == "layer":
            rows = sum(x.groups for x in block.pruned)
        learned = {"what is learned": pruned + _LOGITS * 4 * CANDIDATES * rows}
        parts["gradients and activations"] = activations + 12 * largest
        parts["scores and sorting"] = 4 * pruned  # nothing is sorted meanwhile
    return parts | learned


def _scores(block: BlockShape, setting: Setting) -> int:
    """Scores 4 L, and what sorting a piece of the largest matrix takes."""
    largest = max(block.pruned, key=lambda x: x.rows * x.cols, default=None)
    if largest is None:
        return 0
    rows, cols = largest.groups * largest.rows, largest.cols
    piece = len(range(*row_chunks(rows, cols)[0].indices(rows))) * cols
    if setting.on_gpu:
        piece = min(rows * cols, _ON_GPU * piece)
    return 4 * block.prunable + _SORT_BYTES * piece


def _solving(block: BlockShape) -> int:
    """What an update takes for a level: Gram matrices, factors, and matrices of one linear.

    8 cols^2 for each input of the level (its own products and those with the dense one), 16 cols^2
    for the factors, and 28 rows cols for target, free and kept weights, dual and temporaries.
    """
    needs = [0]
    for level in block.levels:
        pruned = [x for x in level if x.pruned]
        if pruned:
            grams = 8 * pruned[0].groups * pruned[0].cols ** 2
            columns = max(x.cols for x in pruned)
            needs.append(grams + 16 * columns**2 + 28 * max(x.rows * x.cols for x in pruned))
    return max(needs)


def around_blocks(shape: ModelShape, setting: Setting) -> list[Moment]:
    """The moments before the first block.

    - others: what belongs to no block is copied, s for each number;
    - capture: the embedding, and hidden states tokens * width * s from which streams are made.
    """
    hidden = setting.tokens * shape.width * setting.stored
    streams = (
        0
        if setting.config.activations == "disk"
        else sum(stream_bytes(shape.width, setting).values())
    )
    return [
        Moment("copy", {"embedding, norms, head": shape.others * setting.stored}),
        Moment(
            "embed",
            {
                "embedding": shape.embedding * setting.stored,
                "hidden states": hidden,
                "calibration streams": streams,
            },
        ),
    ]


def text_bytes(shape: ModelShape, setting: Setting) -> int:
    """What reading the text takes at most: the tokenizer, and what it says of each token.

    Measured: to load a tokenizer takes 14 times its tokenizer.json and leaves 10 times; what it
    makes of a text takes 600 bytes a token.
    """
    cutting = _LOADED * shape.tokenizer + _TOKEN_BYTES * text_tokens(setting)
    return int(max(_LOADING * shape.tokenizer, cutting))


def left_by_text(shape: ModelShape, setting: Setting) -> dict[str, int]:
    """What of that the C library keeps when it is freed: some 40%."""
    return {"left by the tokenizer": int(_LEFT * text_bytes(shape, setting))}


def text_tokens(setting: Setting) -> float:
    """How many tokens of the text are cut at once, at most.

    As many as all windows need that samples are drawn from, and as a guess at their letters is a
    large one, 1.8 times as many; or all that the text has.
    """
    wanted = _GENEROUS * WINDOWS_PER_SAMPLE * setting.tokens
    name = setting.config.calibration
    if name == "builtin":
        return min(wanted, _BUILTIN_TOKENS)
    text = Path(name)
    return min(wanted, text.stat().st_size / _LETTERS) if text.is_file() else wanted
