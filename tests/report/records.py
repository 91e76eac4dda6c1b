"""Random records of the shape that besa.json has, for the tests of the pages."""

from __future__ import annotations

import math
import random
from typing import Any

LLAMA = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (64, 256),
    "self_attn.v_proj": (64, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (688, 256),
    "mlp.up_proj": (688, 256),
    "mlp.down_proj": (256, 688),
}
GPT2 = {
    "attn.c_attn": (256, 768),
    "attn.c_proj": (256, 256),
    "mlp.c_fc": (256, 1024),
    "mlp.c_proj": (1024, 256),
}
MOE = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (64, 256),
    "self_attn.v_proj": (64, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.experts.gate_up_proj": (16, 352, 256),
    "mlp.experts.down_proj": (16, 256, 176),
}
MIXTRAL = {
    **{f"self_attn.{n}_proj": (64, 64) for n in "qkvo"},
    **{f"block_sparse_moe.experts.{e}.w{w}": (96, 64) for e in range(8) for w in (1, 2, 3)},
}


def run(
    blocks: int = 8,
    linears: dict[str, tuple[int, ...]] = LLAMA,
    *,
    method: str = "besa",
    target: float = 0.5,
    pattern: str = "unstructured",
    granularity: str = "row",
    model: str = "example-org/Llama-3-8B",
    seed: int = 0,
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A run's record. Wanda's rates are all the target; BESA's vary by row, linear and depth."""
    chance = random.Random(seed)
    even = method != "besa" or ":" in pattern
    likes = {name: chance.gauss(0, 0.07) for name in linears}
    found = []
    for index in range(blocks):
        made = []
        for name, shape in linears.items():
            rows = math.prod(shape[:-1])
            centre = target + likes[name] + chance.gauss(0, 0.02) + 0.04 * (index / blocks - 0.5)
            spread = chance.uniform(0.02, 0.07) if granularity == "row" else 0.0
            rates = [
                target if even else min(max(chance.gauss(centre, spread), 0.02), 0.98)
                for _ in range(min(rows, 400))
            ]
            histogram = [0] * 50
            for rate in rates:
                histogram[min(int(rate * 50), 49)] += 1
            mean = sum(rates) / len(rates)
            linear = {
                "name": name,
                "shape": list(shape),
                "zeros": round(mean * math.prod(shape)),
                "sparsity": mean,
                "rows": {
                    "min": min(rates),
                    "mean": mean,
                    "max": max(rates),
                    "histogram": histogram,
                },
            }
            if len(shape) == 3 and index % 5 == 3:
                linear["unrouted_experts"] = [3, 7]
            made.append(linear)
        weights = sum(math.prod(shape) for shape in linears.values())
        wanda = 0.004 + 0.02 * (index + 1) / blocks * chance.uniform(0.8, 1.2)
        if index == 0:
            wanda *= 2.5
        error = wanda if method == "wanda" else wanda * chance.uniform(0.7, 1.02)
        start = error * chance.uniform(1.1, 1.5)
        found.append(
            {
                "index": index,
                "name": f"model.layers.{index}",
                "sparsity": target,
                "zeros": round(target * weights),
                "weights": weights,
                "error": error,
                "error_wanda": None if method == "wanda" else wanda,
                "loss": [start * (error / start) ** (k / 7) for k in range(8)] if not even else [],
                "seconds": chance.uniform(2, 4),
                "linears": made,
            }
        )
    return {
        "besa_version": "0.1.0",
        "format": 1,
        "model": model,
        "architecture": "LlamaForCausalLM",
        "settings": {
            "method": method,
            "sparsity": target,
            "pattern": pattern,
            "granularity": granularity if method == "besa" else None,
            "calibration": "builtin",
            "samples": 128,
            "seqlen": 256,
            "epochs": 2,
            "seed": seed,
            "device": "cpu",
            "dtype": "float32",
            "include": None,
            "exclude": "lm_head",
        },
        "versions": {"python": "3.12.3", "torch": "2.13.0", "transformers": "5.19.0"},
        "device": "cpu",
        "dtype": "float32",
        "threads": 2,
        "sparsity": {
            "target": target,
            "achieved": target,
            "zeros": sum(block["zeros"] for block in found),
            "weights": sum(block["weights"] for block in found),
        },
        "blocks": found,
        "seconds": 123.4,
        "peak_memory_bytes": 3_456_789_012,
        "peak_device_memory_bytes": None,
        "digests": {f"model-0000{k}-of-00003.safetensors": f"{k:064x}" for k in (1, 2, 3)},
        "notes": list(notes),
    }


def comparison(model: str = "besa-demo") -> dict[str, Any]:
    """A comparison's record, with figures like those of a small model."""
    table = {
        "50%": {"magnitude": 34.6, "wanda": 34.5, "sparsegpt": 32.6, "layer": 33.9, "row": 33.1},
        "60%": {"magnitude": 46.2, "wanda": 44.7, "sparsegpt": 40.1, "layer": 42.0, "row": 40.3},
        "70%": {"magnitude": 131.0, "wanda": 94.7, "sparsegpt": 72.8, "layer": 78.1, "row": 72.6},
        "2:4": {"magnitude": 61.0, "wanda": 49.2, "sparsegpt": 40.2, "row": 50.3},
    }
    rows = []
    for setting, values in table.items():
        for name, perplexity in values.items():
            other = name != "wanda"
            besa = name in ("layer", "row")
            gap = values["wanda"] - 27.9
            rows.append(
                {
                    "method": "besa" if besa else name,
                    "granularity": name if besa else None,
                    "setting": setting,
                    "perplexity": perplexity,
                    "standard_error": perplexity * 0.012,
                    "recovered": (values["wanda"] - perplexity) / gap if other else None,
                    "margin": math.log(values["wanda"] / perplexity) if other else None,
                    "margin_se": 0.0011 if other else None,
                    "seconds": 12.5 if besa else 2.5,
                }
            )
    return {
        "model": model,
        "text": "builtin:test",
        "seqlen": 256,
        "tokens": 65536,
        "dense": {"perplexity": 27.9, "standard_error": 0.31},
        "rows": rows,
        "versions": {"besa": "0.1.0", "torch": "2.13.0"},
        "machine": "2 cores, Example CPU",
    }
