"""How long `besa prune` takes a block of LLaMA-2 on one GPU, and so the whole model.

    PYTHONPATH=. python benchmarks/gpu_pipeline.py --json gpu_pipeline.json
    PYTHONPATH=. python benchmarks/gpu_pipeline.py --tiny --device cpu      # a quick look

`besa.prune` itself runs, with its default settings (BESA, rates by row, half of the weights, one
epoch), on models of LLaMA-2's shapes that have few blocks of seeded random weights: files are read
and written, activations go to host memory and back. Samples have 2,048 tokens. There are fewer than
the paper's 128, so that it takes a minute; what one more sample costs in each phase gives the time
of a block with all of them. Of several blocks the last one counts: the first also pays for what is
made once, and only a later one is loaded while another is pruned.

What the copies of activations cost is measured by itself: the dense run with its statistics, which
computes least for each byte, with all activations on the GPU, from pinned memory as in pruning,
from ordinary memory through pinned buffers as with `--activations disk`, and from ordinary memory
with every copy waited for. All ways have to end with the same bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    SHAPES,
    Shape,
    conditions,
    llama_block,
    llama_config,
    random_llama,
    seconds_of,
    spread,
    table,
    write_json,
    write_words,
)
from transformers import LlamaForCausalLM

from besa.model.blocks import find_linears
from besa.progress import WRITTEN, Event
from besa.pruning.activations import Activations
from besa.pruning.batches import single
from besa.pruning.block_run import BlockRun
from besa.pruning.config import PruneConfig
from besa.pruning.pipeline import PruneResult
from besa.pruning.run import prune
from besa.pruning.transfers import Copies, copies_for, staged

SAMPLES = 128  # the paper's
VOCABULARY = 4096

# Measuring a block's error takes an eighth of the batches twice: beside Wanda, and BESA's own.
ERROR_SHARE = 2 / 8


@dataclass(frozen=True)
class Model:
    """A model that is measured by some blocks.

    Attributes:
        blocks: of the whole model.
        pruned: blocks that are pruned here.
        samples: of calibration here.
        goal: seconds for the whole model.
    """

    name: str
    shape: Shape
    blocks: int
    pruned: int
    samples: int
    goal: float


MODELS = [
    Model("LLaMA-2-7B", SHAPES["llama-7b"], 32, pruned=2, samples=32, goal=20 * 60),
    Model("LLaMA-2-70B", Shape(8192, 28672, 64, 8), 80, pruned=1, samples=16, goal=3.5 * 3600),
]
TINY = [Model("tiny", SHAPES["tiny"], 4, pruned=2, samples=9, goal=60)]


@dataclass
class Times:
    """When each block's phases had their first and their last step."""

    steps: dict[tuple[int, str], tuple[float, float]] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        assert event.block is not None
        now, key = time.monotonic(), (event.block, event.phase)
        first, _ = self.steps.get(key, (now, now))
        self.steps[key] = first, now

    def phases(self, block: int, seconds: float) -> dict[str, float]:
        """Seconds by phase of a block that took so long from its loading to its handing on.

        A step is told of when it is queued; the host is at most four batches ahead of the GPU.
        """
        (dense, dense_end), (learn, learn_end), (hand, hand_end), (_, written) = (
            self.steps[block, phase] for phase in ("statistics", "learn", "hand on", WRITTEN)
        )
        return {
            "load, to the GPU": dense - (hand_end - seconds),
            "statistics": dense_end - dense,
            "rank": learn - dense_end,
            "learn": learn_end - learn,
            "project, errors": hand - learn_end,
            "hand on": hand_end - hand,
            "write": written - hand_end,
        }


def measure(model: Model, device: str, tokens: int, directory: Path) -> dict[str, Any]:
    """Prunes a model's few blocks; gives seconds by phase, and those of the whole model."""
    path, text = directory / "model", directory / "text.txt"
    random_checkpoint(path, model, tokens, device)
    write_words(text, model.samples * tokens)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    config = PruneConfig(
        out=directory / "pruned",
        update="none",
        calibration=str(text),
        samples=model.samples,
        seqlen=tokens,
        device=device,
    )
    times = Times()
    result = prune(path, config, times)
    blocks = [times.phases(i, block.seconds) for i, block in enumerate(result.record.blocks)]
    return {
        "name": model.name,
        "shape": vars(model.shape),
        "settings": result.record.settings,
        "goal_seconds": model.goal,
        "blocks": [{"seconds": sum(phases.values()), "phases": phases} for phases in blocks],
        "error": result.record.blocks[-1].error,
        "error_wanda": result.record.blocks[-1].error_wanda,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_host_bytes": result.record.peak_memory_bytes,
        **extrapolated(model, blocks, result),
    }


def extrapolated(
    model: Model, blocks: list[dict[str, float]], result: PruneResult
) -> dict[str, float]:
    """The seconds of a block with all samples, and of all blocks.

    What a run does before its blocks, such as embedding the samples, is taken for each sample.
    """
    phases, more = blocks[-1], SAMPLES - model.samples
    steps = model.samples - 1  # between the first and the last
    sample = (phases["statistics"] + phases["learn"]) / steps
    sample += phases["hand on"] / steps * (1 + ERROR_SHARE)
    block = sum(phases.values()) + more * sample
    around = result.record.seconds - sum(sum(each.values()) for each in blocks)
    return {
        "seconds_a_sample": sample,
        "seconds_a_block": block,
        "seconds_around_blocks": around * SAMPLES / model.samples,
        "seconds_a_model": block * model.blocks + around * SAMPLES / model.samples,
    }


def random_checkpoint(directory: Path, model: Model, tokens: int, device: str) -> None:
    """Writes a Llama with random bfloat16 weights, made on the device, and a tokenizer."""
    random_llama(directory, SHAPES["tiny"], layers=1)  # for its tokenizer
    torch.set_default_dtype(torch.float32)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    config = llama_config(model.shape, model.pruned, VOCABULARY, positions=tokens)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).to(torch.bfloat16)
    llama = llama.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in llama.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(1.0)
    llama.save_pretrained(directory)


@torch.no_grad()
def copies(model: Model, device: str, tokens: int, runs: int) -> dict[str, Any]:
    """Seconds of a dense run with statistics and targets, by where the activations are."""
    block, call = llama_block(model.shape, torch.bfloat16, device, tokens)
    hidden = [
        torch.randn(1, tokens, model.shape.hidden, dtype=torch.bfloat16, device=device)
        for _ in range(model.samples)
    ]

    def stream_of(copies: Copies | None) -> Activations:
        return Activations.of(hidden, torch.bfloat16, None, "stream", copies)

    where = torch.device(device)
    aside = copies_for(where)
    streams: dict[str, Any] = {"on the GPU": hidden, "pinned, overlapped": stream_of(aside)}
    if aside is not None:
        buffered = staged(aside, hidden[0].numel(), torch.bfloat16)
        streams["ordinary, through buffers"] = stream_of(buffered)
    streams["ordinary, waited for"] = stream_of(None)
    runs_of = {}
    for way, stream in streams.items():
        is_list = isinstance(stream, list)
        runs_of[way] = BlockRun(
            stored=block,
            linears=find_linears(block, "block", None),
            calls=[call] * len(hidden),
            stream=stream,
            targets=list(hidden) if is_list else Activations.like(stream, len(hidden), "dense"),
            groups=single([len(one) for one in hidden]),
            device=where,
            dtype=torch.bfloat16,
            config=PruneConfig(out="nowhere"),
        )
    seconds: dict[str, list[float]] = {way: [] for way in runs_of}
    for counts in [False, *[True] * runs]:
        for way, run in runs_of.items():
            taken = seconds_of(lambda run=run: run.observe(False, run.targets.__setitem__), device)
            if counts:
                seconds[way].append(taken)
    check_equal(runs_of)
    size = sum(tensor.nbytes for tensor in hidden)
    return {
        "shape": vars(model.shape),
        "samples": len(hidden),
        "bytes": {"in": size, "out": size},
        "seconds": {way: spread(values) for way, values in seconds.items()},
    }


def check_equal(runs: dict[str, BlockRun]) -> None:
    """Sends every stream through the block twice; all have to hold the same bits then."""
    for run in runs.values():
        for _ in range(2):
            run.expect(range(len(run.stream)), targets=False)
            for i in range(len(run.stream)):
                run.stream[i] = run.output(i)
    (first, expected), *others = runs.items()
    order = torch.randperm(len(expected.stream)).tolist()
    for way, run in others:
        run.expect(order)
        for i in order:
            for name in ("stream", "targets"):
                a, b = (getattr(each, name)[i].to(run.device) for each in (run, expected))
                if not torch.equal(a, b):
                    raise SystemExit(f"batch {i} of the {name} is not as {first}: {way}")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", action="append", help="only these: LLaMA-2-7B, LLaMA-2-70B")
    parser.add_argument("--samples", type=int, help="of calibration, instead of 32 and 16")
    parser.add_argument("--tokens", type=int, default=2048, help="in a sample")
    parser.add_argument("--runs", type=int, default=3, help="of the copies")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu-pipeline.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: give --device cpu")
    models, tokens = (TINY, 512) if args.tiny else (MODELS, args.tokens)
    if args.samples:
        models = [Model(**{**vars(model), "samples": args.samples}) for model in models]
    models = [model for model in models if not args.model or model.name in args.model]

    result: dict[str, Any] = {"conditions": conditions(args.device), "tokens": tokens, "models": []}
    for model in models:
        with tempfile.TemporaryDirectory() as directory:
            measured = measure(model, args.device, tokens, Path(directory))
        result["models"].append(measured)
        write_json(args.json, result, quiet=True)
        print(_blocks_table(measured), flush=True)
        print(_verdict(model, measured), flush=True)
    result["copies"] = copies(models[0], args.device, tokens, args.runs)
    write_json(args.json, result)
    times = result["copies"]["seconds"]
    print(table(["dense run", "s"], [(way, f"{s['median']:.3f}") for way, s in times.items()]))


def _blocks_table(measured: dict[str, Any]) -> str:
    """Seconds by phase, a column for each block."""
    blocks = measured["blocks"]
    rows: list[list[str]] = [
        [phase, *(f"{block['phases'][phase]:.2f}" for block in blocks)]
        for phase in blocks[0]["phases"]
    ]
    rows.append(["all", *(f"{block['seconds']:.2f}" for block in blocks)])
    samples = measured["settings"]["samples"]
    head = f"{measured['name']}, {samples} samples, s"
    return table([head, *(f"block {i + 1}" for i in range(len(blocks)))], rows)


def _verdict(model: Model, measured: dict[str, Any]) -> str:
    minutes = measured["seconds_a_model"] / 60
    return (
        f"with {SAMPLES} samples {measured['seconds_a_block']:.1f} s a block, × {model.blocks} "
        f"and {measured['seconds_around_blocks']:.0f} s around them: {minutes:.1f} min "
        f"(goal: {model.goal / 60:.0f})"
    )


if __name__ == "__main__":
    main()
