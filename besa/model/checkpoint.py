"""Streams a Hugging Face checkpoint in and out, one decoder block at a time.

`Checkpoint` opens a directory of safetensors, builds the model's skeleton (parameters on the meta
device) and sorts the stored tensors by the block that they belong to. `load_block` brings one
block's weights into the skeleton and `unload_block` sends them off again; `stored_tensors` gives a
block's weights back under the names and in the layout of the files, whatever transformers does to
them on loading (fused experts, renamed keys).

>>> checkpoint = Checkpoint.open("path/to/model")
>>> block = checkpoint.load_block(0)
>>> block.self_attn.q_proj.weight.data[:, 0] = 0
>>> tensors = checkpoint.stored_tensors(0)
>>> tensors["model.layers.0.self_attn.q_proj.weight"][:, 0].count_nonzero()
tensor(0)
>>> checkpoint.unload_block(0)
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from besa.errors import BesaError, one_line
from besa.model.architecture import loader_of, read_config
from besa.model.blocks import find_blocks
from besa.model.companions import copy_companions
from besa.model.completeness import check_complete
from besa.model.files import (
    open_tensors,
    resolve,
    stored_dtype,
    stored_shapes,
    weight_files,
    whole_numbers,
)
from besa.model.finite import check_finite
from besa.model.json_files import read_object
from besa.model.quantization import check_floats, without_notes
from besa.model.skeleton import free_parameters, skeleton_of, targets_of, tied_names
from besa.writing import write_text


@dataclass
class Checkpoint:
    """A model on disk and its skeleton in memory.

    Attributes:
        directory: where the model was read from.
        config: its transformers config.
        model: the skeleton; parameters are on the meta device unless their block is loaded.
        blocks_name: the name of the list of blocks in the model ("model.layers").
        blocks: the decoder's blocks.
        files: the file of each stored tensor.
        block_keys: the names of the stored tensors of each block.
        other_keys: the names of all other stored tensors.
        targets: the model's parameter that each stored tensor goes into (the first, if several).
        converted: the stored tensors that are cut up, stacked or turned on the way, as experts are.
        trust_remote_code: whether code that lies beside the files may run.
        conversions: what transformers does to stored tensors when it loads them.
        borrowed: the stored tensor that stands for a parameter which has none of its own, because
            the model ties it to another one: a head stored alone, weights that blocks share.
    """

    directory: Path
    config: Any
    model: nn.Module
    blocks_name: str
    blocks: nn.ModuleList
    files: dict[str, Path]
    block_keys: list[list[str]]
    other_keys: list[str]
    targets: dict[str, str]
    converted: set[str]
    borrowed: dict[str, str]
    trust_remote_code: bool
    conversions: list[Any]
    # A thread may load the next block meanwhile, and transformers notes in the model, and in the
    # conversions, what it has loaded.
    _loading: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, model: str | Path, trust_remote_code: bool = False) -> Checkpoint:
        """Opens a model directory or hub id; reads headers only.

        Args:
            trust_remote_code: whether code that lies beside the checkpoint may run.

        Raises:
            BesaError: no model, half a model, a quantized model, tensors that are missing or of
                another shape, or an architecture that transformers does not know.
        """
        directory = resolve(model)
        transformers_logging.disable_progress_bar()
        config = read_config(directory, trust_remote_code)
        check_floats(directory, config)
        files = weight_files(directory)
        checkpoint = cls.of(directory, config, files, trust_remote_code)
        shapes = stored_shapes(files)
        check_complete(
            directory,
            checkpoint.model,
            files,
            checkpoint.conversions,
            shapes,
            whole_numbers(files),
        )
        return checkpoint

    @classmethod
    def of(
        cls,
        directory: Path,
        config: Any,
        files: dict[str, Path],
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Checkpoint:
        """The skeleton for a config and the tensors that are stored; reads headers only.

        Args:
            dtype: of the skeleton; None: that of most stored tensors.

        Raises:
            BesaError: transformers does not know the architecture, it has no blocks, or more of
            them than tensors are stored.
        """
        with one_line(f"{directory} is no causal language model"):
            layers = getattr(config.get_text_config(), "num_hidden_layers", None)
            if files and isinstance(layers, int) and layers > len(files):
                raise BesaError(
                    f"{directory}: config.json says {layers:,} layers, but the files have "
                    f"{len(files):,} tensors: download the model again"
                )
            skeleton = skeleton_of(config, dtype or stored_dtype(files), trust_remote_code)
        blocks_name, blocks = find_blocks(skeleton)
        conversions = get_model_conversion_mapping(skeleton)
        targets, converted = targets_of(files, skeleton, conversions)
        prefix = blocks_name + "."
        numbers = {str(index): index for index in range(len(blocks))}
        block_keys: list[list[str]] = [[] for _ in blocks]
        other_keys = []
        for key, target in targets.items():
            index = numbers.get(target.removeprefix(prefix).split(".", 1)[0])
            if index is not None and target.startswith(prefix):
                block_keys[index].append(key)
            else:
                other_keys.append(key)
        return cls(
            directory,
            config,
            skeleton,
            blocks_name,
            blocks,
            files,
            block_keys,
            other_keys,
            targets,
            converted,
            _borrowed(skeleton, targets, converted),
            trust_remote_code,
            conversions,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in."""
        return self.model.dtype  # type: ignore[return-value]

    @property
    def loader(self) -> str:
        """The name of transformers' class that loads the model."""
        return str(loader_of(self.model.config, self.trust_remote_code).__name__)

    @property
    def nbytes(self) -> int:
        """Size of all weight files in bytes."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def fingerprint(self) -> str:
        """A digest of the config and of every file's size and header."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for path in sorted(set(self.files.values())):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(f"{path.name} {path.stat().st_size}".encode())
                digest.update(file.read(length))
        return digest.hexdigest()

    def load_block(self, index: int, files: Mapping[str, Path] | None = None) -> nn.Module:
        """Brings a block's weights into memory, from the model or from `files` that override it.

        Raises:
            BesaError: a weight of the block is not in the checkpoint, or of another shape.
        """
        files = files or self.files
        self._load(self.block_keys[index], files)
        self._load_borrowed(f"{self.blocks_name}.{index}.", files)
        block = self.blocks[index]
        for own_name, parameter in block.named_parameters():
            if parameter.is_meta:
                raise self._lacking(f"{self.blocks_name}.{index}.{own_name}")
        return block

    def _lacking(self, name: str) -> BesaError:
        if name in self.targets.values():
            return BesaError(f"{self.directory}: {name} has another shape than config.json says")
        return BesaError(f"{self.directory} lacks the weight {name}")

    def unload_block(self, index: int) -> None:
        """Frees a block's weights; its buffers stay."""
        free_parameters(self.blocks[index])

    @contextmanager
    def loaded_base(self) -> Iterator[nn.Module]:
        """The model without its blocks and its head, for the call that `capture` makes.

        Raises:
            BesaError: one of its weights is not in the checkpoint.
        """
        name = self.blocks_name.split(".")[0]
        base, prefix = self.model.get_submodule(name), name + "."
        keys = [key for key in self.other_keys if self.targets[key].startswith(prefix)]
        self._load(keys, self.files)
        self._load_borrowed(prefix, self.files, but=self.blocks_name + ".")
        for name, parameter in self.model.named_parameters():
            inside = name.startswith(prefix) and not name.startswith(self.blocks_name + ".")
            if inside and parameter.is_meta:
                raise self._lacking(name)
        try:
            yield base
        finally:
            free_parameters(base)

    def _load(self, keys: list[str], files: Mapping[str, Path]) -> None:
        with self._loading, open_tensors(files, keys) as tensors:
            convert_and_load_state_dict_in_model(
                self.model,
                tensors,
                LoadStateDictConfig(dtype=self.dtype, weight_mapping=self.conversions),
            )

    def _load_borrowed(self, prefix: str, files: Mapping[str, Path], but: str = " ") -> None:
        """Loads what is stored under another name, below `prefix` and not below `but`."""
        for name, key in self.borrowed.items():
            if not name.startswith(prefix) or name.startswith(but):
                continue
            owner, _, own = name.rpartition(".")
            with open_tensors({key: files.get(key, self.files[key])}, [key]) as tensors:
                value = tensors[key][...].to(self.dtype)
            module = self.model.get_submodule(owner)
            module._parameters[own] = nn.Parameter(value, requires_grad=False)

    def stored_tensors(self, index: int) -> dict[str, Tensor]:
        """A loaded block as the files hold it, with the changes that were made to it in memory.

        What was not changed comes back byte for byte, in its own dtype.

        Raises:
            BesaError: transformers cannot turn the block back into the files' layout.
        """
        after = self._in_files_layout(index)
        self.load_block(index)
        before = self._in_files_layout(index)
        # Old files may spell a name differently, without the base model's prefix above all.
        targets, _ = targets_of(after, self.model, self.conversions)
        spelt = {target: name for name, target in targets.items()}
        known = self.model.state_dict()
        tensors = {}
        with open_tensors(self.files, self.block_keys[index]) as slices:
            for key in self.block_keys[index]:
                source = tensors[key] = slices[key][...]
                target = self.targets[key]
                name = key if key in after else spelt.get(target)
                if name is None and target in known:
                    raise BesaError(
                        f"{type(self.model).__name__} is not supported: transformers does not "
                        f"give {key} back"
                    )
                # What the model does not know, such as old buffers, travels along.
                if name is not None and not _bytes_equal(before[name], after[name]):
                    tensors[key] = after[name].to(source.dtype).contiguous()
        return tensors

    def _in_files_layout(self, index: int) -> dict[str, Tensor]:
        block, prefix = self.blocks[index], f"{self.blocks_name}.{index}."
        tensors = {prefix + name: value for name, value in block.state_dict().items()}
        return dict(revert_weight_conversion(self.model, tensors))

    @contextmanager
    def other_tensors(self) -> Iterator[dict[str, Tensor]]:
        """All tensors that belong to no block, as they are stored.

        Raises:
            BesaError: a weight among them holds NaN or Inf. A buffer may, as a bound that bounds
                nothing.
        """
        buffers = {name for name, _ in self.model.named_buffers()}
        with open_tensors(self.files, self.other_keys) as slices:
            tensors = {key: tensor[...] for key, tensor in slices.items()}
            for key, tensor in tensors.items():
                if self.targets[key] not in buffers:
                    check_finite(tensor, key, "mend the checkpoint")
            yield tensors

    def copy_companions(self, out: Path) -> None:
        """Copies config, tokenizer, license and all else that belongs to the model."""
        copy_companions(self.directory, frozenset(self.files.values()), out)
        config = read_object(self.directory / "config.json")
        if config != (plain := without_notes(config)):
            write_text(json.dumps(plain, indent=2) + "\n", out / "config.json")


def _borrowed(model: nn.Module, targets: Mapping[str, str], converted: set[str]) -> dict[str, str]:
    """The stored tensor of another name for each parameter that has none of its own."""
    stored = {target: key for key, target in targets.items() if key not in converted}
    borrowed = {}
    for name, others in tied_names(model).items():
        if name not in stored:
            lenders = [stored[other] for other in others if other in stored]
            borrowed.update({name: lenders[0]} if lenders else {})
    return borrowed


def _bytes_equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(_bytes(a), _bytes(b)))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
