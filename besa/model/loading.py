"""Loads a whole model and its tokenizer for evaluation, or says in one line why not.

>>> from besa.model.files import model_directory
>>> directory = model_directory("path/to/model")
>>> model = load_model(directory, dtype="bfloat16", device="cpu")
>>> tokenizer = load_tokenizer(directory)
>>> model(**tokenizer("Hi", return_tensors="pt")).logits.shape
torch.Size([1, 2, 257])
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from besa.errors import BesaError, one_line
from besa.model.architecture import loader_of, read_config
from besa.model.files import not_of_floats, weight_files, whole_numbers
from besa.model.quiet import quiet

# The files that hold a tokenizer's vocabulary, in any of the formats that transformers reads.
_VOCABULARIES = ("tokenizer.json", "*vocab*", "*.model", "*.tiktoken")


def pick_device(name: str | None) -> torch.device:
    """The device of that name; by default the GPU if there is one, else the CPU.

    Raises:
        BesaError: the device is not there.
    """
    if name is None:
        present = torch.accelerator.current_accelerator(check_available=True)
        return present or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()  # `meta`, for one, has no values to give
    except (RuntimeError, AssertionError, NotImplementedError):
        present = torch.accelerator.current_accelerator(check_available=True)
        there = f"{present.type} and cpu are" if present else "only cpu is"
        raise BesaError(f"device {name} is not there: {there}") from None
    return device


def computing_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What weights that are stored in a dtype are computed in, by the name or by `auto`."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu" or stored == torch.float32:
        return torch.float32
    return torch.bfloat16  # float16 too: its range is too small for gradients


def max_positions(directory: Path, trust_remote_code: bool = False) -> int | None:
    """How many tokens the model takes at once; None where its config sets no bound.

    Raises:
        BesaError: a config that transformers cannot read.
    """
    with quiet():
        return positions_of(read_config(directory, trust_remote_code))


def positions_of(config: Any) -> int | None:
    """The same, of a config that is read already."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies beside the model.

    Raises:
        BesaError: none is there, or transformers cannot read it.
    """
    try:
        with quiet(), one_line(f"{directory} has no tokenizer that can be loaded"):
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except BesaError:
        if any(any(directory.glob(pattern)) for pattern in _VOCABULARIES):
            raise
        raise BesaError(
            f"{directory} has no tokenizer: copy tokenizer.json and tokenizer_config.json of the "
            "model that it was made from into it"
        ) from None


def load_model(
    directory: Path,
    dtype: str,
    device: torch.device | str,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> Any:
    """The model in evaluation mode; every weight comes from the checkpoint.

    Args:
        dtype: one of `besa.settings.DTYPES`; `auto` keeps what the checkpoint says.
        trust_remote_code: whether code that lies beside the checkpoint may run.
        attention: transformers' way to compute it; None for its own choice.

    Raises:
        BesaError: transformers cannot load it, weights are missing, or it does not fit.
    """
    with quiet(), one_line(f"{directory} cannot be loaded"):
        model = whole_model(
            directory, trust_remote_code, dtype=dtype, attn_implementation=attention
        )
    with fitting_in_memory(f"{directory}", "choose a smaller dtype or another device"):
        model.to(device)
    return model.eval()


def whole_model(directory: Path, trust_remote_code: bool, **options: Any) -> Any:
    """The model as transformers loads it, where it leaves no weight to chance.

    Args:
        options: of `from_pretrained`.

    Raises:
        BesaError: weights are missing, of another shape, or no floats. What transformers raises
            comes as it is.
    """
    config = read_config(directory, trust_remote_code)
    loaded: Any  # with output_loading_info, a pair
    loaded = loader_of(config, trust_remote_code).from_pretrained(
        directory,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
        use_safetensors=True,  # or, where none are there, it would read a pickle
        trust_remote_code=trust_remote_code,
        **options,
    )
    model, info = loaded
    tensors = model.state_dict()
    for name, kind in whole_numbers(weight_files(directory)).items():
        if name in tensors and tensors[name].is_floating_point():
            raise not_of_floats(directory, name, kind)
    if misshapen := sorted(name for name, *_ in info["mismatched_keys"]):
        raise BesaError(
            f"{directory}: {misshapen[0]} has another shape than config.json says: download the "
            "model again"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise BesaError(f"{directory} lacks {len(missing)} weights of the model, as {missing[0]}")
    return model


@contextmanager
def fitting_in_memory(what: str, remedy: str) -> Iterator[None]:
    """Turns the device's out-of-memory error into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise BesaError(f"{what} does not fit into the device's memory: {remedy}") from None
