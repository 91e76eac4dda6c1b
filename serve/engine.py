"""An engine's process: `python -m besa.serve.engine vllm serve DIR …`, started by `besa serve`.

vLLM starts processes that import this module once more: it has to be quick, and to do nothing.
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> None:
    """Runs an engine until it is told to stop.

    Args:
        arguments: one of `besa.serve.engines.ENGINES`, "serve", the model's directory, and flags.
    """
    from besa.serve.engines import engine_named

    name, _serve, *rest = arguments
    engine_named(name).run(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
