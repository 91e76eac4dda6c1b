"""What a model says before and after it is pruned: greedy continuations, side by side.

    python benchmarks/samples.py --name "Gemma 3 270M" --json benchmarks/results/samples.json \
        "dense=path/to/gemma" "Wanda, 50%=/tmp/real/wanda-50" "besa, 50%=/tmp/real/besa-50"

Prompts are fixed, none was chosen by its answers. From the record the table of docs/results.md is
written (benchmarks/readme.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from besa.machine import machine
from besa.version import versions

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, in a small village by the sea,",
    "The most important thing to know about machine learning is",
    "In 1969, the first humans",
)
TOKENS = 32


def continuations(directory: str, prompts: tuple[str, ...] = PROMPTS) -> list[str]:
    """What a model in float32 says after each prompt, greedily, without what ends a text."""
    # Not above: benchmarks/readme.py takes the table alone.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True))
    return found


def samples_table(record: dict[str, Any]) -> str:
    """The prompts, and what each model makes of them."""
    lines = []
    for number, prompt in enumerate(record["prompts"]):
        lines += [f"**{prompt}** …", ""]
        for name, said in record["models"].items():
            text = " ".join(said[number].split()).replace("|", "\\|").replace("*", "\\*")
            lines.append(f"- {name}: {text} …")
        lines.append("")
    lines.append(
        f"{record['name']}, greedy, {record['tokens']} tokens. By `benchmarks/samples.py`, which "
        "holds the prompts; none was chosen by its answers."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DIRECTORY")
    parser.add_argument("--name", required=True, help="of the model, in the record")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    models = dict(one.rsplit("=", 1) for one in args.models)
    record = {
        "name": args.name,
        "tokens": TOKENS,
        "prompts": PROMPTS,
        "models": {name: continuations(directory) for name, directory in models.items()},
        "machine": machine(),
        "versions": versions(),
    }
    args.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(samples_table(record))


if __name__ == "__main__":
    main()
