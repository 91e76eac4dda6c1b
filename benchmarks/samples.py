"""What pruned models write, greedily, side by side.

    python benchmarks/samples.py --name "Gemma 3 270M" "dense=path/to/gemma" \
        "Wanda, 50%=/tmp/real/wanda-50" "besa, 50%=/tmp/real/besa-50"

The record goes to benchmarks/results/samples.json and from there into docs/results.md
(benchmarks/readme.py). The prompts are those that stand here; none was left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from besa.model.loading import load_model, load_tokenizer
from besa.version import versions
from besa.writing import write_text

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "In 1969, the first human being",
    "Once upon a time there was a little girl who",
    "To make bread, you need",
    "The most important thing about a good friend is",
)
TOKENS = 32


@torch.no_grad()
def written(directory: Path) -> list[str]:
    """What a model makes of each prompt."""
    model, tokenizer = load_model(directory, "float32", "cpu"), load_tokenizer(directory)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DIRECTORY")
    parser.add_argument("--name", required=True, help="of the dense model")
    results = Path(__file__).parent / "results/samples.json"
    parser.add_argument("--results", type=Path, default=results)
    args = parser.parse_args()
    found = {}
    for model in args.models:
        name, _, directory = model.partition("=")
        found[name] = written(Path(directory))
    record = {
        "model": args.name,
        "tokens": TOKENS,
        "prompts": PROMPTS,
        "texts": found,
        "versions": versions(),
    }
    write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", args.results)


if __name__ == "__main__":
    main()
