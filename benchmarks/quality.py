"""Quality beside size: a real model that besa pruned, and the same in llama.cpp's formats.

    python benchmarks/quality.py --work DIR --model path/to/gemma --name "Gemma 3 270M" \
        --pruned /tmp/real --calibration wikitext2-valid.txt --text wikitext2-test.txt \
        --llama PYTHON --llama-cpp path/to/llama.cpp --llama-bin path/to/llama.cpp/build/bin

Every model reads the same windows of the text, each after a beginning token. besa's are what
`benchmarks/table.py --work PRUNED` left there, packed by `besa export` as they were pruned, and
read through the packed kernels. llama.cpp's are made of the dense model by its own tools, with an
importance matrix of the calibration text where the format makes use of one. What an earlier call
wrote to the results stays, but for the models that are measured again: `--only "Q4_0"`.

PYTHON is one with `llama-cpp-python[server]` and `gguf`; llama.cpp's converter runs in the Python
that runs this (it asks for `sentencepiece`). `--speed` measures tokens a second instead, one
request at a time, besa's models in vLLM, every server in turn: for a machine that does nothing
else. Results go to benchmarks/results/quality.json and serving/quality.json, and from there into
pictures (quality_report.py) and docs/results.md (readme.py).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bits import stored_parts
from common import RESULTS, conditions, run_besa, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from besa.evaluation.config import EvalConfig

THREADS = len(os.sched_getaffinity(0))
DENSE = "dense"


@dataclass(frozen=True)
class Pruned:
    """A model that benchmarks/table.py left in `directory`, and how it is exported."""

    directory: str
    flags: tuple[str, ...] = ()


# Where a name has a type, weights were rounded to it while they were pruned, or at export.
PRUNED = {
    "30%": Pruned("besa-30"),
    "40%": Pruned("besa-40"),
    "50%": Pruned("besa-50"),
    "30% int8 at export": Pruned("besa-30", ("--quantize", "int8")),
    "40% int8 at export": Pruned("besa-40", ("--quantize", "int8")),
    "40% int4 at export": Pruned("besa-40", ("--quantize", "int4")),
    "50% int8": Pruned("besa-int8-50"),
    "50% int8 weight-only": Pruned("besa-int8-50", ("--weight-only",)),
    "50% int4": Pruned("besa-int4of64-50"),
    "50% int4 weight-only": Pruned("besa-int4of64-50", ("--weight-only",)),
}
# Of them those that are timed, unless `--only` says it: each is a server that stays in memory.
TIMED = (DENSE, "50%", "50% int8", "50% int4")
# llama.cpp's formats, and whether an importance matrix serves them.
GGUF = {
    "BF16": False,
    "Q8_0": False,
    "Q4_K_M": True,
    "Q4_0": True,
    "Q3_K_M": True,
    "IQ3_XXS": True,
}


# --------------------------------------------------------------------------- models


def packed_models(args: argparse.Namespace) -> dict[str, Path]:
    """besa's models by name, exported to --work; of those that were not pruned yet it says so."""
    found = {}
    for name, pruned in PRUNED.items():
        if not wanted(args, name):
            continue
        source, out = args.pruned / pruned.directory, args.work / f"besa-{slug(name)}"
        if not (source / "besa.json").exists():
            print(f"{name} is left out: {source} is not there", file=sys.stderr)
            continue
        if not out.exists():
            run_besa("export", source, *pruned.flags, "--out", out)
        found[name] = out
    return found


def gguf_models(args: argparse.Namespace) -> dict[str, Path]:
    """llama.cpp's models by the names of their formats, made in --work."""
    source, matrix = args.work / "bf16.gguf", args.work / "imatrix.gguf"
    if not source.exists():
        script = args.llama_cpp / "convert_hf_to_gguf.py"
        run([sys.executable, script, args.model, "--outtype", "bf16", "--outfile", source])
    if not matrix.exists():
        # As many tokens as besa calibrates with.
        limits = ["-c", args.seqlen, "--chunks", args.samples, "-t", THREADS]
        # The text has <unk> for rare words, which besa reads as a token, too.
        files = ["-m", source, "-f", args.calibration, "--parse-special", "-o", matrix]
        run([args.llama_bin / "llama-imatrix", *files, *limits])
    found = {"BF16": source}
    for kind, weighted in GGUF.items():
        out = found.setdefault(kind, args.work / f"{kind.lower()}.gguf")
        if not out.exists():
            flags = ["--imatrix", matrix] if weighted else []
            run([args.llama_bin / "llama-quantize", *flags, source, out, kind, THREADS])
    return found


def run(command: list[object]) -> None:
    """A program of llama.cpp's; if it fails, so does the benchmark, with the end of its output."""
    words = [str(word) for word in command]
    print(" ".join(words), file=sys.stderr, flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed:\n{done.stdout[-4000:]}")


def slug(name: str) -> str:
    """A name as a directory's.

    >>> slug("50% int8")
    '50-int8'
    """
    return name.replace("%", "").replace(" ", "-")


# --------------------------------------------------------------------------- quality


def measure(args: argparse.Namespace) -> None:
    """Measures every model, and adds each to the record as soon as it is known."""
    windows = windows_of(args)
    shared = {
        "name": args.name,
        "text": args.text.name,
        "calibration": args.calibration.name,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "tokens": len(windows) * (args.seqlen - 1),
    }
    for row in chain(besa_rows(args), llama_rows(args, windows)):
        before = json.loads(args.json.read_text()) if args.json.exists() else {**shared, "rows": []}
        assert shared.items() <= before.items(), "the results are of another text, or other samples"
        rows = together(before["rows"], row)
        record = {**shared, "rows": rows, "conditions": before.get("conditions", {})}
        record["conditions"] |= versions(args)
        write_json(args.json, record, quiet=True)
        print(f"{row['engine']} {row['name']}: {row['perplexity']:.2f}", flush=True)


def together(before: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with another one, and how much worse each is than the dense model, if that is known.

    One that was there stays, unless it was of the same model.
    """
    rows = {(one["engine"], one["name"]): one for one in [*before, row]}
    dense = rows.get(("besa", DENSE))
    if dense is not None:
        for one in rows.values():
            one["worse"] = worse(one["losses"], dense["losses"])
    return sorted(rows.values(), key=lambda one: (one["engine"], -linear_bits(one)))


def beginning(args: argparse.Namespace) -> int | None:
    """The token that the model's texts begin with, if its tokenizer puts one there."""
    from besa.data.beginning import bos_token
    from besa.model.loading import load_tokenizer

    return bos_token("auto", load_tokenizer(args.model))


def evaluation(args: argparse.Namespace) -> EvalConfig:
    """What `besa eval` would be told: float32 but for what weights are packed as."""
    from besa.evaluation.config import EvalConfig

    return EvalConfig(
        texts=(str(args.text),),
        seqlen=args.seqlen,
        bos="never" if beginning(args) is None else "always",
        dtype="float32",
        limit=args.limit,
    )


def windows_of(args: argparse.Namespace) -> Tensor:
    """The windows that `besa eval --limit` reads, each after a beginning token."""
    from besa.evaluation import evaluate
    from besa.model.loading import load_tokenizer

    tokenizer, text = load_tokenizer(args.model), str(args.text)
    return evaluate.windows_of(tokenizer, text, args.seqlen, evaluation(args), beginning(args))


def besa_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The dense model and besa's packed ones."""
    from besa.evaluation.evaluate import evaluate

    dense = {DENSE: args.model} if wanted(args, DENSE) else {}
    config = evaluation(args)
    # One at a time, so that what is done is known.
    for name, path in (dense | packed_models(args)).items():
        (result,) = evaluate([str(path)], config)
        yield row_of("besa", name, result.perplexity.losses, sizes(path))


def sizes(directory: Path) -> dict[str, Any]:
    """Weights and bytes of the blocks' linears and of all else, of a dense or a packed model."""
    from safetensors import safe_open

    from besa.model.checkpoint import Checkpoint
    from besa.model.export_record import PackedRecord
    from besa.model.record import read_record

    record, packed = read_record(directory), dict(stored_parts(directory))
    if isinstance(record, PackedRecord):
        assert not record.dense, "a linear was left dense"
        weights = sum(linear.shape[0] * linear.shape[1] for linear in record.linears)
        size = sum(packed.values())
    else:
        dense = Checkpoint.open(directory)
        parameters = [each for block in dense.blocks for each in block.parameters()]
        weights = sum(each.numel() for each in parameters if each.ndim > 1)
        size = weights * dense.dtype.itemsize
    counts, total = 0, 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                total += tensor.nbytes
                counts += 0 if name in packed else tensor.numel()
    others = counts if packed else counts - weights
    return {
        "linears": {"weights": weights, "bytes": size},
        "others": {"weights": others, "bytes": total - size},
    }


def llama_rows(args: argparse.Namespace, windows: Tensor) -> Iterator[dict[str, Any]]:
    """llama.cpp's models on the same windows."""
    if args.llama is None:
        return
    import numpy as np
    import torch

    file = args.work / "windows.npy"
    np.save(file, windows.numpy())
    for name, model in gguf_models(args).items():
        if not wanted(args, name):
            continue
        out = model.with_suffix(".json")
        script = Path(__file__).with_name("gguf_losses.py")
        subprocess.run([args.llama, script, model, file, out], check=True)
        found = json.loads(out.read_text())
        losses = torch.tensor(found.pop("losses"), dtype=torch.float64)
        yield row_of("llama.cpp", name, losses, found)


def wanted(args: argparse.Namespace, name: str) -> bool:
    return not args.only or name in args.only


def row_of(engine: str, name: str, losses: Tensor, parts: dict[str, Any]) -> dict[str, Any]:
    """A row of the record, but for how much worse than dense it is."""
    from besa.evaluation.perplexity import Perplexity

    found = Perplexity.of(losses, 2)
    return {
        "engine": engine,
        "name": name,
        "perplexity": found.perplexity,
        "standard_error": found.standard_error,
        "losses": losses.tolist(),
        **parts,
    }


def worse(losses: list[float], reference: list[float]) -> dict[str, float]:
    """Than the reference on the same windows, in nats a token, with its paired standard error."""
    import torch

    from besa.evaluation.perplexity import paired

    own, other = (torch.tensor(each, dtype=torch.float64) for each in (losses, reference))
    nats, error = paired(own, other)
    return {"nats": nats, "standard_error": error}


def linear_bits(row: dict[str, Any]) -> float:
    """Bits that a weight of the blocks' linears takes."""
    part = row["linears"]
    return float(part["bytes"] * 8 / part["weights"])


def versions(args: argparse.Namespace) -> dict[str, Any]:
    from serving import LLAMA, version_of

    found = conditions()
    if args.llama is not None:
        found["llama-cpp-python"] = version_of(LLAMA, args.llama)
    return found


# --------------------------------------------------------------------------- speed


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """One run of `besa bench`: besa's models in vLLM, and llama.cpp's, in turns."""
    from serving import BASE, ONE, llama_contenders, show

    from besa.bench.results import results_json
    from besa.bench.run import bench
    from besa.bench.settings import Contender

    args.only = args.only or [*TIMED, *GGUF]
    dense = {DENSE: args.model} if wanted(args, DENSE) else {}
    ours = (dense | packed_models(args)).items()
    contenders = [Contender(name, str(path)) for name, path in ours]
    theirs = {name: file for name, file in gguf_models(args).items() if wanted(args, name)}
    with ExitStack() as stack:
        more, servers = stack.enter_context(llama_contenders(theirs, args.llama))
        config = replace(
            BASE,
            contenders=(*contenders, *more),
            loads=(ONE,),
            engine="vllm",
            engine_args=("--max-model-len", "1024"),
            rounds=args.rounds,
            output_length=64,
        )
        results = bench(config, show)
    known = (replace(x, **servers.get(x.name, {})) for x in results.contenders)
    return results_json(replace(results, contenders=tuple(known)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="where the models are made")
    add("--model", type=Path, required=True, help="the dense one")
    add("--name", required=True, help="of the model, in the record")
    add("--pruned", type=Path, required=True, help="where benchmarks/table.py left its models")
    add("--calibration", type=Path, required=True)
    add("--text", type=Path, required=True)
    add("--samples", type=int, default=64)
    add("--seqlen", type=int, default=512)
    add("--limit", type=int, default=32, help="windows of the text")
    add("--only", nargs="+", metavar="NAME", help="of the models that are measured")
    add("--llama", metavar="PYTHON", help="one that has llama-cpp-python and gguf")
    add("--llama-cpp", type=Path, metavar="DIR", help="llama.cpp's sources, for its converter")
    add("--llama-bin", type=Path, metavar="DIR", help="with llama-imatrix and llama-quantize")
    add("--speed", action="store_true", help="tokens a second instead of quality")
    add("--rounds", type=int, default=5)
    add("--json", type=Path)
    args = parser.parse_args()
    default = RESULTS / ("serving/quality.json" if args.speed else "quality.json")
    args.json = args.json or default
    args.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no server stays
    if args.speed:
        write_json(args.json, speed(args))
    else:
        measure(args)


if __name__ == "__main__":
    main()
