"""The process of a load generator: it stays, for its imports take longer than many a measurement.

    python -m besa.bench.client_process vllm     # then orders on standard input, as JSON

Started by `besa.bench.generator`.
"""

from __future__ import annotations

import sys
from typing import Any

from besa.bench.child import answer_questions, redirect_output
from besa.bench.generator import CLIENTS
from besa.bench.load_client import Order
from besa.typed_json import from_json, to_json


def main(name: str) -> None:
    redirect_output()
    make_load = CLIENTS[name].load()

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        answered: dict[str, Any] = to_json(make_load(from_json(Order, question)))
        return answered

    answer_questions(answer, first={"ready": True})


if __name__ == "__main__":
    main(sys.argv[1])
