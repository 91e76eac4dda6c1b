"""How many bits a weight takes in each packed format, at several sparsities, all counted.

    python benchmarks/bits.py                                # benchmarks/results/bits.json
    python benchmarks/bits.py --tiny --json /tmp/bits.json   # in seconds

A Llama of one block of TinyLlama's widths, its weights random, loses the smallest weights of each
matrix, or the two smallest of each four. `besa export` packs it in each format, and transformers
loads it. Bytes are counted of every tensor that stands for a packed linear: on disk in the
safetensors files, in memory among the buffers of the loaded modules, and on a GPU in the records
that its kernels read (laid out on the CPU, which gives the same bytes). A bit a weight is one for
each weight of the dense matrix.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import RESULTS, SHAPES, apart, conditions, random_llama, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

SETTINGS = ("40%", "50%", "60%", "70%", "2:4")
FLOATS = ("bfloat16", "float16", "float32")
GROUPS: dict[str, tuple[int | None, ...]] = {
    **dict.fromkeys(FLOATS, (None,)),
    "int8": (None, 32, 64, 128),
    "int4": (32, 64, 128),
}
BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "int8": 8, "int4": 4}
# A linear's parts whatever it is called: the norms stay dense.
LINEAR = "_proj.weight"


def measured(shape: str, vocab: int) -> list[dict[str, Any]]:
    """The rows of the record: every format at every setting."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense, pruned = Path(folder) / "dense", Path(folder) / "pruned"
        # Apart, as it sets torch's default type.
        apart(random_llama, dense, SHAPES[shape], 1, vocab)
        for setting in SETTINGS:
            for kind, groups in GROUPS.items():
                shutil.rmtree(pruned, ignore_errors=True)
                dtype = kind if kind in FLOATS else "bfloat16"
                weights = prune(dense, pruned, setting, dtype)
                for group in groups:
                    row = {"values": kind, "group_size": group, "setting": setting}
                    sizes = packed_bytes(pruned, Path(folder) / "packed", kind, group)
                    assert sizes["weights"] == weights, "a linear was left dense"
                    rows.append(row | sizes)
    return rows


def prune(dense: Path, out: Path, setting: str, dtype: str) -> int:
    """Writes the model without its smallest weights, in this type; how many its linears have."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    linears = [each for name, each in model.named_parameters() if name.endswith(LINEAR)]
    with torch.no_grad():
        for weight in linears:
            weight.mul_(kept(weight, setting))
    model.to(getattr(torch, dtype)).save_pretrained(out)
    return sum(weight.numel() for weight in linears)


def kept(weight: Tensor, setting: str) -> Tensor:
    """Which weights stay: "50%" takes the smallest of the matrix, "2:4" two of each four in a row.

    >>> import torch
    >>> kept(torch.tensor([[1.0, -4.0, 2.0, 3.0]]), "2:4")
    tensor([[False,  True, False,  True]])
    """
    import torch

    if ":" in setting:
        stay, of = map(int, setting.split(":"))
        fours = weight.abs().unflatten(1, (-1, of))
        mask = torch.zeros(fours.shape, dtype=torch.bool)
        return mask.scatter_(2, fours.topk(stay, 2).indices, True).flatten(1)
    count = round(weight.numel() * (1 - float(setting.rstrip("%")) / 100))
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().topk(count).indices] = True
    return mask.view(weight.shape)


def packed_bytes(pruned: Path, out: Path, kind: str, group: int | None) -> dict[str, Any]:
    """What `besa export` makes of the model: bytes of its linears on disk, in memory, on a GPU."""
    from transformers import AutoModelForCausalLM

    from besa.export import ExportConfig, export
    from besa.formats.module import SparseLinear

    quantize = None if kind in FLOATS else kind
    config = ExportConfig(out=out, quantize=quantize, group_size=group, overwrite=True)
    export(pruned, config)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return {
        "weights": sum(linear.in_features * linear.out_features for linear in linears),
        "nonzeros": sum(linear.packed.nonzeros for linear in linears),
        "disk_bytes": sum(size for _, size in stored_parts(out)),
        "memory_bytes": sum(buffer.nbytes for one in linears for buffer in one.buffers()),
        "row_numbers_bytes": sum(linear.weight_rows.nbytes for linear in linears),
        "gpu_bytes": None if kind == "float32" else sum(map(gpu_bytes, linears)),
    }


def stored_parts(directory: Path) -> Iterator[tuple[str, int]]:
    """The tensors of packed linears in a checkpoint's files, and their bytes."""
    from safetensors import safe_open

    from besa.formats.checkpoint import parts_in

    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in parts_in(list(file.keys())):
                yield name, file.get_tensor(name).nbytes


def gpu_bytes(linear: nn.Module) -> int:
    """What a linear takes on a GPU that besa has kernels for: records, scales and steps."""
    from besa.formats.int4 import in_eight_bits
    from besa.kernels.cuda.records import parts, to_records

    packed: Any = linear.packed
    steps = packed.steps
    whole = packed if steps is None else in_eight_bits(packed)
    records = to_records(*parts(whole), packed.in_features)
    return records.nbytes + sum(x.nbytes for x in (whole.scale, steps) if x is not None)


# --------------------------------------------------------------------------- what pages show


def bits_tables(record: dict[str, Any]) -> str:
    """A line for each format: bits a weight on disk and in memory, and then on a GPU."""
    head = " | ".join(record["settings"])
    rules = "| --- |" + " --- |" * len(record["settings"])
    by_format: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        by_format.setdefault(format_name(row), {})[row["setting"]] = row

    def lines(title: str, *places: str) -> list[str]:
        found = [f"| {title} | {head} |", rules]
        for name, rows in by_format.items():
            cells = [
                " / ".join(f"{bits(rows[setting], place):.2f}" for place in places)
                for setting in record["settings"]
                if rows[setting][f"{places[0]}_bytes"] is not None
            ]
            if cells:
                found.append(f"| {name} | {' | '.join(cells)} |")
        return found

    first = record["rows"][0]
    rows = bits(first, "row_numbers")
    return "\n".join(
        [
            *lines("bits a weight, on disk / in memory", "disk", "memory"),
            "",
            *lines("bits a weight, on a GPU", "gpu"),
            "",
            f"Every tensor of the {first['weights'] / 1e6:.0f} million weights of one block of "
            f"{record['shape']}'s widths is counted; weights are random, the smallest are gone. "
            "In memory: as transformers holds them on a CPU, with where each row begins, which is "
            f"found at load; vLLM drops the row numbers, {rows:.3f} bits. "
            "By `python benchmarks/bits.py`.",
        ]
    )


def bits(row: dict[str, Any], place: str) -> float:
    """Of a row of the record, "disk", "memory" or "gpu"."""
    found: float = row[f"{place}_bytes"] * 8 / row["weights"]
    return found


def format_name(row: dict[str, Any]) -> str:
    """As a table has it: "int8, groups of 32", "int8, a scale a row"."""
    if row["values"] in FLOATS:
        return str(row["values"])
    group = row["group_size"]
    return f"{row['values']}, " + (f"groups of {group}" if group else "a scale a row")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a block of a few thousand weights")
    parser.add_argument("--json", type=Path, default=RESULTS / "bits.json")
    args = parser.parse_args()
    record = {
        "shape": "a tiny Llama" if args.tiny else "TinyLlama",
        "settings": SETTINGS,
        "rows": measured("tiny" if args.tiny else "tinyllama", 512),
        "conditions": conditions(),
    }
    write_json(args.json, record)
    print(bits_tables(record))


if __name__ == "__main__":
    main()
