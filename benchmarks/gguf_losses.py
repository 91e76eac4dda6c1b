"""What llama.cpp makes of windows of tokens: their losses, and the bytes of the file's tensors.

    python benchmarks/gguf_losses.py MODEL.gguf WINDOWS.npy OUT.json

Runs where `llama-cpp-python` and `gguf` are installed, not where besa is. The tokens are given, so
that the file's tokenizer plays no part. As in besa.evaluation.perplexity a window's loss is the
mean of its tokens but the first, in nats, and no window sees another.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

# Positions whose logits are looked at together: 64 MiB where there are 262,144 words.
POSITIONS = 64


def losses(path: Path, windows: np.ndarray) -> list[float]:
    """The mean loss of each window [n, tokens] under a model."""
    threads = len(os.sched_getaffinity(0))
    length = windows.shape[1]
    model = llama_cpp.Llama(
        str(path),
        n_ctx=length,
        n_batch=length,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    found = []
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        found.append(loss(model.scores[: length - 1], window[1:]))
        print(f"{path.name}: {len(found)} of {len(windows)}", file=sys.stderr, flush=True)
    return found


def loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean cross entropy in nats; logits [positions, words]."""
    total = 0.0
    for start in range(0, len(targets), POSITIONS):
        part = logits[start : start + POSITIONS]
        wanted = targets[start : start + POSITIONS]
        most = part.max(1, keepdims=True)
        sums = np.log(np.exp(part - most).sum(1, dtype=np.float64)) + most[:, 0]
        total += float((sums - part[np.arange(len(wanted)), wanted]).sum())
    return total / len(targets)


def sizes(path: Path) -> dict[str, Any]:
    """Weights and bytes of the blocks' matrices and of all else, and the matrices' types."""
    parts = {name: {"weights": 0, "bytes": 0} for name in ("linears", "others")}
    types: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        linear = tensor.name.startswith("blk.") and len(tensor.shape) > 1
        part = parts["linears" if linear else "others"]
        part["weights"] += int(tensor.n_elements)
        part["bytes"] += int(tensor.n_bytes)
        if len(tensor.shape) > 1:
            types[f"{'linears' if linear else 'others'} {tensor.tensor_type.name}"] += int(
                tensor.n_elements
            )
    return {**parts, "types": dict(types)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path, help="tokens, int64 [windows, tokens]")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    found = {"losses": losses(args.model, np.load(args.windows)), **sizes(args.model)}
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
