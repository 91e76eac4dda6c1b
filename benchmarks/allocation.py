"""What learning the rates of one block costs: besa's masks against dense probability masks.

    python benchmarks/allocation.py                    # CPU, float32 and bfloat16
    python benchmarks/allocation.py --device cuda      # needs torch, transformers, safetensors

`dense` is the obvious way to write BESA down, and the one that the paper's authors chose: the sort
order of a linear's importance as int64; at each step the pruning probability of every sorted
position, scattered by that order into a matrix like the weight; the hard mask by comparison; the
straight-through sum of both as a dense tensor under autograd. It is written here from the paper
(arXiv 2402.16880, equations 4 to 6), each operation the fastest of those that torch has for it.
`besa` is `besa.pruning.allocate`: a byte per weight, and a segment sum as the gradient. Both give
the same mask, and the same gradient up to rounding: that is checked on each shape before it is
timed.

Two parts of a learning step are measured, for one calibration sample:

- `mask`: from the logits to the block's masked weights, and from gradients to the masked weights
  back to the logits. This is all in which the two differ.
- `step`: the whole of it, with the block's forward and backward pass and the optimiser.

Times are of alternating runs, in one process. Memory is the most held during two steps beyond
what was held with the block, its inputs and (for `mask`) the incoming gradients in place, so the
representation itself counts, and the masked weights do: on a CPU resident memory, in a process of
its own for each figure; on a GPU what torch's allocator handed out. In a `step` autograd also
keeps the block's own activations, whatever masks its weights: `of_activations` says how many
bytes, and besa's share of the dense memory is given with and without them.
"""

from __future__ import annotations

import argparse
import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    SHAPES,
    apart,
    conditions,
    llama_block,
    one_line,
    seconds_of,
    spread,
    table,
    write_json,
)
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from besa.model.blocks import find_linears
from besa.pruning.allocate import (
    CANDIDATES,
    RankedMatrix,
    RateLearner,
    RateMask,
    kept_buckets,
    rank_buckets,
    rate_mask,
)
from besa.pruning.batches import Group
from besa.pruning.learn import learn_step
from besa.pruning.masked import WeightFactory, masked

SPARSITY = 0.5
CONTENDERS = ("dense", "besa")
PARTS = ("mask", "step")

# The least that the two gradients to the logits may agree in direction.
COSINE = 0.999


@dataclass(frozen=True)
class Case:
    """What is measured: one block and one sample."""

    shape: str
    dtype: str
    device: str
    tokens: int
    threads: int


class Block:
    """A case's block, its linears, the sample and the logits of all rows."""

    def __init__(self, case: Case) -> None:
        dtype = getattr(torch, case.dtype)
        self.block, self.call = llama_block(
            SHAPES[case.shape], dtype, case.device, case.tokens, seed=0
        )
        self.linears = find_linears(self.block, "block", None)
        self.weights = [self.block.get_parameter(x.parameter) for x in self.linears]
        self.generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(1, case.tokens, SHAPES[case.shape].hidden, generator=self.generator)
        self.hidden = hidden.to(case.device, dtype)
        # A bell around the target on each row, shaken so that rows differ.
        candidates = torch.arange(CANDIDATES) / CANDIDATES
        bell = -((candidates - SPARSITY) ** 2) / (2 * 0.05**2)
        self.thetas = [
            (bell + torch.randn(x.rows, CANDIDATES, generator=self.generator))
            .to(case.device)
            .requires_grad_()
            for x in self.linears
        ]

    def scores(self) -> Iterator[Tensor]:
        """Wanda's importance of each linear with random input norms, one after the other."""
        for weight in self.weights:
            norms = torch.rand(weight.shape[1], generator=self.generator).to(weight.device) + 0.1
            yield weight.float().abs() * norms

    def gradients(self) -> list[Tensor]:
        """What a backward pass would bring to the masked weights."""
        return [torch.randn_like(weight) for weight in self.weights]

    def forward(self, _: int, weights: Sequence[WeightFactory]) -> Tensor:
        """The block's output with masked weights that are made where they are used."""
        by_name = {x.name: [weight] for x, weight in zip(self.linears, weights, strict=True)}
        with masked(self.block, self.linears, by_name):
            return self.call.run(self.block, self.hidden)


# ---- besa's way


def besa_representation(scores: Tensor) -> Tensor:
    """uint8 [rows, cols]: the bucket of each weight's rank."""
    return rank_buckets(scores)


def besa_masks(
    weights: Sequence[Tensor], representation: Sequence[Tensor], theta: Tensor
) -> list[RateMask]:
    """The masked matrices by the logits of all rows, as `RateLearner` makes them."""
    rows = [len(weight) for weight in weights]
    kept = kept_buckets(theta, torch.arange(CANDIDATES, device=theta.device) / CANDIDATES)
    matrices = map(RankedMatrix, weights, representation)
    given = matrices, kept.keep.split(rows), kept.first.split(rows)
    return [rate_mask(*one) for one in zip(*given, strict=True)]


def besa_masked(weight: Tensor, buckets: Tensor, theta: Tensor) -> Tensor:
    """One matrix masked by its buckets, under autograd."""
    return besa_masks([weight], [buckets], theta)[0]()


def first_kept(beta: Tensor) -> Tensor:
    """The first bucket that the hard mask keeps, float [rows]."""
    candidates = torch.arange(CANDIDATES, device=beta.device) / CANDIDATES
    return (beta.detach() @ candidates * CANDIDATES).round().clamp(max=CANDIDATES - 1)


def besa_steps(block: Block, representation: Sequence[Tensor], target: Tensor) -> Iterator[Any]:
    """Learning steps, by besa.pruning.allocate."""
    matrices = [
        RankedMatrix(weight, buckets)
        for weight, buckets in zip(block.weights, representation, strict=True)
    ]
    learner = RateLearner(matrices, SPARSITY)
    while True:
        yield learn_step(learner, block.forward, Group(len(target), range(1)), [target])


# ---- the dense way


def dense_representation(scores: Tensor) -> Tensor:
    """int64 [rows, cols]: the columns from the least to the most important."""
    return scores.argsort(dim=1, stable=True)


def dense_masked(weight: Tensor, order: Tensor, theta: Tensor) -> Tensor:
    """Masked weight by a dense probability mask under autograd."""
    beta = theta.softmax(1)
    pruned = 1 - beta.cumsum(1)  # the probability of being pruned, by the part of the ranking
    cols = weight.shape[1]
    part = torch.arange(cols, device=weight.device) * CANDIDATES // cols
    by_position = pruned.index_select(1, part)
    probability = torch.empty_like(by_position).scatter_(1, order, by_position)
    threshold = pruned.detach().gather(1, first_kept(beta).long().unsqueeze(1))
    hard = (probability.detach() <= threshold).float()
    keep = 1 - probability
    mask = hard + (keep - keep.detach())
    return weight * mask.to(weight.dtype)


@contextmanager
def dense_linears(block: Block, weights: Sequence[WeightFactory]) -> Iterator[None]:
    """Inside, each linear of the block masks its weight when it is called."""
    modules = [block.block.get_submodule(x.name) for x in block.linears]
    for module, weight in zip(modules, weights, strict=True):
        module.forward = lambda x, weight=weight: nn.functional.linear(x, weight())  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def dense_steps(block: Block, representation: Sequence[Tensor], target: Tensor) -> Iterator[Any]:
    """Learning steps like those of `RateLearner`, with dense masks."""
    candidates = torch.arange(CANDIDATES, device=target.device) / CANDIDATES
    thetas = [theta.detach().clone().requires_grad_() for theta in block.thetas]
    sizes = torch.tensor([float(x.size) for x in block.linears], device=target.device)
    optimizer = torch.optim.Adam(thetas, lr=0.2, betas=(0.9, 0.99))
    while True:
        given = zip(block.weights, representation, thetas, strict=True)
        with dense_linears(block, [partial(dense_masked, *one) for one in given]):
            output = block.call.run(block.block, block.hidden)
        error = (output.float() - target.float()).square().mean()
        rates = torch.stack([(theta.softmax(1) @ candidates).mean() for theta in thetas])
        rate = rates @ sizes / sizes.sum()
        loss = error / target.float().square().mean()
        loss = loss + 5.0 * ((rate - SPARSITY) / SPARSITY) ** 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


REPRESENTATION: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": dense_representation,
    "besa": besa_representation,
}
MASKED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dense": dense_masked,
    "besa": besa_masked,
}
STEPS: dict[str, Callable[[Block, Sequence[Tensor], Tensor], Iterator[Any]]] = {
    "dense": dense_steps,
    "besa": besa_steps,
}


def mask_part(
    contender: str, block: Block, representation: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Callable[[], None]:
    """One pass through the masks of all linears, there and back, as a step does it.

    A step with dense masks holds all it made until the backward pass has used it; besa makes a
    masked weight where it is used, forgets it, and makes it anew for the backward pass. Its logits
    are one tensor.
    """
    given = list(zip(block.weights, representation, block.thetas, strict=True))
    logits = block.thetas
    if contender == "besa":
        logits = [torch.cat(block.thetas).detach().requires_grad_()]

    def at_once() -> None:
        masked = [dense_masked(*one) for one in given]
        torch.autograd.backward(masked, list(gradients))

    def one_by_one() -> None:
        masks = besa_masks(block.weights, representation, logits[0])
        for mask in masks:
            mask.make()
        to_keep = []
        for mask, gradient in zip(masks, gradients, strict=True):
            mask.make()
            to_keep.append(mask.gradient(gradient))
        torch.autograd.backward([mask.parameter for mask in masks], to_keep)

    def work() -> None:
        for theta in logits:
            theta.grad = None
        {"dense": at_once, "besa": one_by_one}[contender]()

    return work


def step_part(
    contender: str, block: Block, representation: Sequence[Tensor], target: Tensor
) -> Callable[[], object]:
    """One whole learning step."""
    steps = STEPS[contender](block, representation, target)
    return lambda: next(steps)


def check_alike(block: Block, representations: dict[str, list[Tensor]]) -> dict[str, float]:
    """The share of equal mask entries, and the least cosine of the gradients to the logits.

    Raises:
        SystemExit: the contenders do not do the same thing.
    """
    same = total = 0
    cosine = 1.0
    for i, weight in enumerate(block.weights):
        gradient = torch.randn_like(weight)
        masked, to_theta = {}, {}
        for contender in CONTENDERS:
            theta = block.thetas[i].detach().requires_grad_()
            output = MASKED[contender](weight, representations[contender][i], theta)
            output.backward(gradient)
            assert theta.grad is not None
            masked[contender], to_theta[contender] = output.detach(), theta.grad.flatten()
        same += int((masked["dense"] == masked["besa"]).sum())
        total += weight.numel()
        alike = torch.cosine_similarity(to_theta["dense"], to_theta["besa"], dim=0)
        cosine = min(cosine, float(alike))
    if same < total or cosine < COSINE:
        raise SystemExit(f"not alike: {same} of {total} mask entries, cosine {cosine}")
    return {"equal_mask_entries": same / total, "least_gradient_cosine": cosine}


# ---- memory


def held(device: str, field: str = "VmRSS") -> int:
    """Bytes of memory in use now."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell a process's memory in /proc")


def restart_peak(device: str) -> None:
    """Forgets the peak so far."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """The most bytes in use since `restart_peak`."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return held(device, "VmHWM")


def extra_memory(case: Case, contender: str, part: str) -> dict[str, int]:
    """Bytes beyond the block and its inputs: the representation's, and the peak of two steps."""
    torch.set_num_threads(case.threads)
    if case.device == "cpu":  # what a first step loads for good is not the step's
        _two_steps(Case("tiny", case.dtype, case.device, 16, case.threads), contender, part)
    return _two_steps(case, contender, part)


def _two_steps(case: Case, contender: str, part: str) -> dict[str, int]:
    block = Block(case)
    if part == "mask":
        gradients = block.gradients()
    else:
        with torch.no_grad():
            target = block.call.run(block.block, block.hidden)
    before = held(case.device)
    representation = [REPRESENTATION[contender](scores) for scores in block.scores()]
    restart_peak(case.device)
    if part == "mask":
        work: Callable[[], object] = mask_part(contender, block, representation, gradients)
    else:
        work = step_part(contender, block, representation, target)
    work()
    work()
    return {
        "peak_extra": peak(case.device) - before,
        "of_representation": sum(x.numel() * x.element_size() for x in representation),
        "of_activations": 0 if part == "mask" else activations(block),
    }


def activations(block: Block) -> int:
    """Bytes that autograd keeps of the block's own forward pass, without its weights."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for weight in block.weights:
        weight.requires_grad_()
    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block.call.run(block.block, block.hidden)
    for weight in block.weights:
        weight.requires_grad_(False)
        kept.pop(weight.untyped_storage().data_ptr(), None)
    kept.pop(block.hidden.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


def measure_memory(case: Case) -> dict[str, Any]:
    """`extra_memory` of every part and contender."""
    measured: dict[str, Any] = {}
    for part in PARTS:
        for contender in CONTENDERS:
            # On a GPU torch counts its own bytes; a CPU's allocator keeps what was freed, which
            # does not matter where the figure does not.
            run = apart if case.device == "cpu" and case.shape != "tiny" else _here
            measured[f"{part}/{contender}"] = run(extra_memory, case, contender, part)
    return measured


def _here(work: Callable[..., Any], *args: Any) -> Any:
    return work(*args)


# ---- time


def measure_time(case: Case, rounds: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Seconds of every part and contender, in turns; and how alike the contenders are."""
    block = Block(case)
    scores = list(block.scores())
    representations = {c: [REPRESENTATION[c](s) for s in scores] for c in CONTENDERS}
    del scores
    alike = check_alike(block, representations)
    measured = {}
    gradients = block.gradients()
    works: dict[str, Callable[[], object]] = {
        c: mask_part(c, block, representations[c], gradients) for c in CONTENDERS
    }
    measured.update({f"mask/{c}": t for c, t in in_turns(works, rounds, case.device).items()})
    del gradients
    with torch.no_grad():
        target = block.call.run(block.block, block.hidden)
    works = {c: step_part(c, block, representations[c], target) for c in CONTENDERS}
    measured.update({f"step/{c}": t for c, t in in_turns(works, rounds, case.device).items()})
    return measured, alike


def in_turns(
    works: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, dict[str, float]]:
    """Seconds of each, A B A B, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for counts in [False, *[True] * rounds]:
        for name, work in works.items():
            taken = seconds_of(work, device)
            if counts:
                seconds[name].append(taken)
    return {name: spread(values) for name, values in seconds.items()}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """All figures of a case."""
    memory = measure_memory(case)
    time, alike = measure_time(case, rounds)
    result: dict[str, Any] = {
        "shape": case.shape,
        **vars(SHAPES[case.shape]),
        "dtype": case.dtype,
        "tokens": case.tokens,
        "alike": alike,
    }
    for part in PARTS:
        dense, besa = (f"{part}/{contender}" for contender in CONTENDERS)
        result[part] = {
            "seconds": {c: time[f"{part}/{c}"] for c in CONTENDERS},
            "speed_up": time[dense]["median"] / time[besa]["median"],
            "bytes": {c: memory[f"{part}/{c}"] for c in CONTENDERS},
            "memory_share": _share(memory[besa], memory[dense]),
            "memory_share_beyond_activations": _share(
                memory[besa], memory[dense], "of_activations"
            ),
        }
    return result


def _share(besa: dict[str, int], dense: dict[str, int], without: str | None = None) -> float:
    """besa's peak as a share of the dense one's, both without a part that they have in common."""
    parts = [size["peak_extra"] - (size[without] if without else 0) for size in (besa, dense)]
    return parts[0] / max(1, parts[1])


def rows_of(result: dict[str, Any]) -> Iterator[list[str]]:
    """The table's rows for one case."""
    for part in PARTS:
        seconds, size = result[part]["seconds"], result[part]["bytes"]
        cells = [f"{result['shape']} {result['dtype']} {part}"]
        for contender in CONTENDERS:
            one = seconds[contender]
            cells.append(f"{one['median'] * 1e3:.1f}")
            cells.append(f"{one['min'] * 1e3:.1f}–{one['max'] * 1e3:.1f}")
        cells.append(f"{result[part]['speed_up']:.2f}×")
        cells += [f"{size[contender]['peak_extra'] / 2**20:.0f}" for contender in CONTENDERS]
        cells.append(f"{result[part]['memory_share']:.2f}")
        cells.append(f"{result[part]['memory_share_beyond_activations']:.2f}")
        cells += [f"{size[c]['of_representation'] / 2**20:.0f}" for c in CONTENDERS]
        yield cells


HEADER = [
    "block",
    *["dense ms", "min–max", "besa ms", "min–max", "speed-up"],
    *["dense MiB", "besa MiB", "share", "without activations", "kept: dense", "besa"],
]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", nargs="+", default=["llama-7b", "tinyllama"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=2048, help="in the sample of a step")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="default: results/allocation-DEVICE.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.shapes, args.tokens, args.rounds = ["tiny"], 16, 2
        args.dtypes = args.dtypes[:1]
    torch.set_num_threads(args.threads)
    path = args.json or RESULTS / f"allocation-{args.device}.json"
    record: dict[str, Any] = {
        "conditions": conditions(args.device),
        "finished": False,
        "tiny": args.tiny,
        "sparsity": SPARSITY,
        "candidates": CANDIDATES,
        "samples_a_step": 1,
        "memory": "resident (VmHWM)" if args.device == "cpu" else "torch's allocator",
        "results": [],
        "failed": {},
    }
    for shape, dtype in itertools.product(args.shapes, args.dtypes):
        case = Case(shape, dtype, args.device, args.tokens, args.threads)
        try:
            record["results"].append(measure(case, args.rounds))
            print(table(HEADER, rows_of(record["results"][-1])), flush=True)
        except Exception as error:  # noqa: BLE001 - the other cases have their turn
            traceback.print_exc()
            record["failed"][f"{shape} {dtype}"] = one_line(error)
        # After every case: a run of minutes that is cut off is not all lost.
        write_json(path, record)
    record["finished"] = True
    write_json(path, record, quiet=True)
    if record["failed"]:
        raise SystemExit(f"failed: {'; '.join(record['failed'])}")


if __name__ == "__main__":
    main()
