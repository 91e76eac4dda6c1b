"""The process of `besa serve --engine transformers`: loads a model, and serves it.

    python -m besa.serve.engine transformers serve DIR --served-model-name tiny --port 8000

Flags are those that `transformers serve` has for the same, and besa.serve.api.server's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, ContinuousBatchingConfig, set_seed
from transformers.utils import logging

from besa.errors import BesaError
from besa.model.loading import whole_model
from besa.serve.api import server
from besa.serve.transformers.backend import TransformersBackend, batches_for

_QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "bnb-4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "bnb-8bit": {"load_in_8bit": True},
}


def run(arguments: list[str]) -> None:
    """Serves until a signal comes.

    Args:
        arguments: DIR, --served-model-name NAME, and flags.
    """
    args = parser().parse_args(arguments)
    logging.set_verbosity(logging.log_levels[args.log_level])
    if args.default_seed is not None:
        set_seed(args.default_seed)
    model = load(args)
    batches = batches_for(model, _batching(args)) if args.continuous_batching else None
    server.run(TransformersBackend(model, batches, args.compile), args)


def parser() -> argparse.ArgumentParser:
    """The flags of this engine's server."""
    made = server.parser("transformers")
    made.add_argument(
        "--continuous-batching",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="requests join and leave a running batch; else one is answered after the other",
    )
    made.add_argument("--dtype", default="auto", help="of the weights (default: as they are)")
    made.add_argument("--device", default="auto")
    made.add_argument("--attn-implementation")
    made.add_argument("--quantization", choices=tuple(_QUANTIZATIONS))
    made.add_argument("--compile", action="store_true", help="only without batching")
    made.add_argument("--default-seed", type=int, help="of requests without one")
    made.add_argument("--cb-block-size", type=int, help="tokens of a page of the cache")
    made.add_argument("--cb-num-blocks", type=int, help="pages of the cache")
    made.add_argument("--cb-max-batch-tokens", type=int, help="of a step")
    made.add_argument("--cb-max-memory-percent", type=float)
    return made


def load(args: argparse.Namespace) -> Any:
    """The model.

    Raises:
        BesaError: its files lack weights, or there is no such type of values.
    """
    directory: Path = args.directory
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype, None)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise BesaError(f"--dtype {args.dtype} is no type of torch's, as float32 or bfloat16")
    quantization = _QUANTIZATIONS.get(args.quantization)  # None would mean not even packed
    more = {"quantization_config": BitsAndBytesConfig(**quantization)} if quantization else {}
    model = whole_model(
        directory,
        args.trust_remote_code,
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        **more,
    )
    return model.to(_device(args.device)).eval()


def _batching(args: argparse.Namespace) -> ContinuousBatchingConfig | None:
    given = {
        "page_size": args.cb_block_size,
        "num_blocks": args.cb_num_blocks,
        "max_batch_tokens": args.cb_max_batch_tokens,
        "max_memory_percent": args.cb_max_memory_percent,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    return ContinuousBatchingConfig(**asked) if asked else None


def _device(asked: str) -> torch.device:
    if asked != "auto":
        return torch.device(int(asked) if asked.isdigit() else asked)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
