"""What one pass over a block takes: operations, and the activations that autograd keeps.

>>> linears = (LinearShape("up", 1, 64, 16), LinearShape("down", 1, 16, 64))
>>> block, attention = BlockShape(linears, 2048), Attention(0, 0, 0)
>>> forward_flops(block, attention, tokens=10, seqlen=10)
40960.0
>>> kept_activations(block, attention, tokens=1, seqlen=1)
224.0
"""

from __future__ import annotations

from collections.abc import Sequence

from besa.planning.shapes import Attention, BlockShape, LinearShape


def forward_flops(block: BlockShape, attention: Attention, tokens: float, seqlen: int) -> float:
    """Operations of a forward pass; a multiplication and an addition are two.

    2 * tokens * uses * rows * cols for each linear, where `uses` is how many experts of it a token
    goes to, and 4 * tokens * seqlen * width for attention: the products of queries with keys and of
    probabilities with values. A mask's zeros are counted, as they are computed. What is not a
    product of matrices is left out.
    """
    linears = sum(2.0 * tokens * x.uses / x.groups * x.size for x in block.linears)
    return linears + attention_flops(attention, tokens, seqlen)


def attention_flops(attention: Attention, tokens: float, seqlen: int) -> float:
    """4 * tokens * keys * width, with as many keys as the window allows."""
    keys = min(seqlen, attention.window or seqlen)
    return 4.0 * tokens * keys * attention.width


def kept_activations(block: BlockShape, attention: Attention, tokens: float, seqlen: int) -> float:
    """Numbers that autograd keeps of a forward pass with learned weights, for its backward pass.

    For each level of linears their input twice: for the products, and for what made it (a norm,
    attention, a gate). For all linears that are not the last of their part the output: queries,
    keys and values, gates. Where attention is not fused, its probabilities of all pairs of tokens,
    before and after they are rounded.

    For Llama that is 2 * (2 * width + heads + inter) + heads + kept + 2 * inter a token, which is
    what `torch.autograd.graph.saved_tensors_hooks` sees to within some percent.
    """
    levels = block.levels
    inputs = sum(level[0].cols * level[0].uses for level in levels if level)
    outputs = sum(x.rows * x.uses for x in _opening(levels))
    numbers = tokens * (2 * inputs + outputs)
    if attention.eager:
        numbers += 2.0 * tokens * seqlen * attention.heads
    return numbers


def transient_activations(block: BlockShape, tokens: float) -> float:
    """Numbers that exist at once in a forward pass without gradients: of the widest level.

    The hidden states before and after, and the inputs and outputs of that level.
    """
    levels = [level for level in block.levels if level]
    if not levels:
        return 0.0
    widest = max(
        level[0].cols * level[0].uses + sum(x.rows * x.uses for x in level) for level in levels
    )
    return tokens * (2 * levels[0][0].cols + widest)


def partial_flops(
    block: BlockShape, attention: Attention, tokens: float, seqlen: int
) -> list[float]:
    """Operations of a forward pass that ends at each level's input, level by level."""
    done, costs = 0.0, []
    for number, level in enumerate(block.levels):
        costs.append(done)
        done += sum(2.0 * tokens * x.uses * x.rows * x.cols for x in level)
        if number == 0:
            done += attention_flops(attention, tokens, seqlen)
    return costs


def _opening(levels: Sequence[Sequence[LinearShape]]) -> list[LinearShape]:
    """The linears that are not alone in the level that ends a part."""
    names = {level[-1].name.rpartition(".")[0] for level in levels if level}
    last = {
        name: [x for level in levels for x in level if x.name.rpartition(".")[0] == name][-1].name
        for name in names
    }
    return [x for level in levels for x in level if x.name != last[x.name.rpartition(".")[0]]]
