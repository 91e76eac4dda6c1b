"""What the benchmarks share: the conditions of a figure, child processes, random models.

    from common import conditions, llama_block, spread, write_json

Run as scripts (`python benchmarks/allocation.py`), they find this file beside them. torch is
imported only where it is used: a script that measures its children's memory must be small itself
(see `run_measured`).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from besa.model.replay import Call

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Shape:
    """The widths of a Llama block."""

    hidden: int
    inter: int
    heads: int
    kv_heads: int


SHAPES = {
    "llama-7b": Shape(4096, 11008, 32, 32),
    "llama-3-8b": Shape(4096, 14336, 32, 8),
    "tinyllama": Shape(2048, 5632, 32, 4),
    "small": Shape(512, 1408, 8, 8),
    "tiny": Shape(64, 176, 4, 2),
}


def conditions(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on besides its settings: machine, threads, versions."""
    import safetensors
    import torch
    import transformers

    import besa
    from besa.kernels import native
    from besa.machine import cpu_name

    there = {
        "cpu": cpu_name(),
        "instructions": _instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "native_kernels": native.library() is not None,
        "python": platform.python_version(),
        "besa": besa.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.device(device).type == "cuda":
        there["gpu"] = torch.cuda.get_device_name(device)
        there["cuda"] = torch.version.cuda
    return there


def _instructions() -> list[str]:
    """Which of the widest instructions the processor has, as Linux tells them."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    widest = {"avx2", "avx_vnni", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"}
    return sorted(words & widest)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, the interval that holds it, extremes and count of repeated measurements."""
    from besa.bench.statistics import spread as interval

    found = interval(values)
    return {
        "median": found.median,
        "low": found.low,
        "high": found.high,
        "min": min(values),
        "max": max(values),
        "runs": len(values),
    }


def gain(ratio: Mapping[str, float]) -> str:
    """A ratio paired by round, from `spread`: its median, and the interval that holds it.

    Records of few rounds have no interval of their own: theirs is from the smallest to the largest
    of n rounds, which holds the median with confidence `besa.bench.statistics.coverage(n, 1)`.
    """
    low, high = ratio.get("low", ratio["min"]), ratio.get("high", ratio["max"])
    span = f"({low:.2f}–{high:.2f})"
    if low <= 1 <= high:
        return f"no difference {span}"
    return f"{ratio['median']:.2f}× {span}"


def in_tokens(count: int) -> str:
    """As a table has it: "1 token", "4 tokens"."""
    return f"{count} token{'' if count == 1 else 's'}"


def milliseconds(seconds: float) -> str:
    """Three digits or so."""
    value = seconds * 1e3
    return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 2}f} ms"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Text in columns, the first to the left, the others to the right."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_json(path: Path, result: Mapping[str, Any], quiet: bool = False) -> None:
    """Writes a result where the figures of README.md and docs/ are taken from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not quiet:
        print(f"written to {path}", flush=True)


def one_line(error: Exception) -> str:
    """An error as a record keeps it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def seconds_of(work: Callable[[], object], device: str = "cpu") -> float:
    """How long `work` takes, to the end of what it queued on the device."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Measured:
    """A finished child process, and those that it waited for.

    Attributes:
        seconds: wall clock.
        processor: seconds of the processor's time.
        peak_rss: bytes of the most memory that one of them held.
    """

    seconds: float
    processor: float
    peak_rss: int


def run_measured(command: Sequence[str], **environment: str) -> Measured:
    """Runs a command to its end; if it fails, so does the benchmark, with its output.

    Args:
        environment: what the command's has more.

    The kernel counts what this process holds as the child's until the child's program starts, so
    the caller must be smaller than what it measures: no torch in it.
    """
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(command), env=whole, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def run_besa(*words: object) -> None:
    """`besa WORDS`; if it fails, so does the benchmark."""
    subprocess.run([sys.executable, "-m", "besa", *map(str, words)], check=True)


def besa_prune(
    model: Path, out: Path, *options: object, launcher: Sequence[str] = (), **environment: str
) -> Measured:
    """`besa prune MODEL --out OUT ...` as a user starts it.

    Args:
        launcher: of Python's arguments what comes before `-m besa`, as torchrun's are.
        environment: what its environment has more.
    """
    command = [sys.executable, *launcher, "-m", "besa", "prune", str(model), "--out", str(out)]
    return run_measured([*command, *map(str, options)], **environment)


def llama_block(
    shape: Shape, dtype: torch.dtype, device: str, tokens: int, seed: int = 0
) -> tuple[nn.Module, Call]:
    """One decoder block with seeded random weights, and its call on windows of `tokens` tokens.

    The same weights whatever the device.
    """
    import torch
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    from besa.model.replay import Call

    config = llama_config(shape, layers=1, vocab=8, positions=tokens)
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, 0).to(dtype)
    block = block.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        else:
            parameter.fill_(1.0)
    positions = torch.arange(tokens, device=device).unsqueeze(0)
    embed = LlamaRotaryEmbedding(config).to(device)
    cos_sin = embed(torch.empty(1, tokens, shape.hidden, dtype=dtype, device=device), positions)
    call = Call((), {"position_embeddings": cos_sin, "position_ids": positions})
    return block, call


def random_llama(directory: Path, shape: Shape, layers: int, vocab: int = 4096) -> None:
    """Writes a Llama with seeded random bfloat16 weights and a tokenizer, a byte a token.

    Call it through `apart`, which leaves no torch in the caller.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    end = "<|endoftext|>"
    alphabet = [end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end
    ).save_pretrained(directory)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(llama_config(shape, layers, vocab, 2048)).save_pretrained(directory)


def random_mixture(
    experts: int, directory: Path, shape: Shape, layers: int, vocab: int = 4096
) -> None:
    """Writes a Mixtral with seeded random bfloat16 weights and a tokenizer, a byte a token.

    Each expert has an eighth of the shape's inner width, and two of them read a token. Call it
    through `apart`, which leaves no torch in the caller.
    """
    from besa.bench.random_models import make_model

    config = llama_config(shape, layers, vocab, 2048).to_diff_dict()
    config |= {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": shape.inter // 8,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "dtype": "bfloat16",
    }
    make_model(directory, config, None)


def random_shape(
    directory: Path,
    shape: str,
    layers: int,
    sparsity: float | None = None,
    vocabulary: int | None = None,
) -> int:
    """Writes the first layers of a shape of `besa bench --shape`; gives how many it has in all.

    Call it through `apart`, which leaves no torch in the caller.

    Args:
        sparsity: of the blocks' linears, at random; None for dense.
        vocabulary: instead of the shape's own.
    """
    from besa.bench.random_models import layers_of, make_model, shape_config

    config = shape_config(shape, layers)
    config["vocab_size"] = vocabulary or config["vocab_size"]
    make_model(directory, config, None if sparsity is None else (sparsity, None))
    return layers_of(shape_config(shape))


def write_words(path: Path, count: int = 40_000) -> None:
    """Writes a calibration text of `count` words: numbers in words, the same every time."""
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    numbers = (" ".join(digits[int(digit)] for digit in str(n)) for n in range(count // 4))
    path.write_text("\n".join(numbers), encoding="utf-8")


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)` in a fresh process; gives what it returns."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def llama_config(shape: Shape, layers: int, vocab: int, positions: int) -> Any:
    """The `LlamaConfig` of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inter,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=positions,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
