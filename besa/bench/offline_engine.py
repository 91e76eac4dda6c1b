"""An engine in a process of its own, stepped by hand: `python -m besa.bench.offline_engine`.

python -m besa.bench.offline_engine transformers DIR 4 128     # 4 sequences of 128 tokens at most
{"batch": 4, "prompt": 64, "steps": 16, "seed": 1}             # a question on standard input

Each question is answered with seconds, {"prefill": …, "steps": […]}, and the last sequence's new
"tokens". The prompts are random tokens.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

from besa.bench.child import answer_questions, redirect_output
from besa.serve.engines import engine_named


def main(engine: str, directory: str, most: int, longest: int) -> None:
    redirect_output()
    started = time.perf_counter()
    model = engine_named(engine).load_offline(directory, most, longest)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        source = random.Random(question["seed"])
        low = min(3, model.vocabulary - 1)  # the first few are special
        prompts = [
            [source.randrange(low, model.vocabulary) for _ in range(question["prompt"])]
            for _ in range(question["batch"])
        ]
        found = model.generate(prompts, question["steps"])
        return {"prefill": found.prefill, "steps": found.steps, "tokens": found.tokens}

    answer_questions(answer, first={"start": time.perf_counter() - started})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
