"""What transformers makes of a config.json: a config, and a model that predicts text.

>>> config = read_config(Path("path/to/model"))
>>> loader_of(config).__name__, type(new_model(config)).__name__
('AutoModelForCausalLM', 'LlamaForCausalLM')

A decoder may be the whole model, or the part of a wrapper that also sees or hears. A checkpoint may
also bring code of its own. That runs only where the user says so; transformers itself would ask on
the terminal, in the midst of a command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from besa.errors import BesaError, one_line
from besa.model.json_files import read_object
from besa.model.quantization import drop_notes, stored_as
from besa.model.quiet import quiet

# transformers makes a list of the layers' kinds, and modules for each, before it reads any weight:
# what is beyond this would keep a machine busy for hours.
_COUNTS, _MOST = re.compile(r"(layer|expert)s?$"), 10_000

# The heads that predict text. A config may have both: then its `architectures` says which.
_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText)


def read_config(directory: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint.

    Args:
        trust_remote_code: whether code that lies beside the checkpoint may run.

    Raises:
        BesaError: no config.json that can be read, an absurd number of layers, a model type that
            transformers does not know, or code that may not run.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise BesaError(f"{directory} is no model: it has no config.json")
    raw = read_object(path)
    for name, count in _counts(raw):
        if count > _MOST:
            raise BesaError(f"{path} says {name} = {count:,}, and no model has above {_MOST:,}")
    if not trust_remote_code and _needs_remote_code(raw):
        raise _untrusted(directory)
    with quiet(), one_line(str(path)):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if stored_as(vars(config)).floats:  # or transformers would want the tool that left the notes
        drop_notes(config)
    return config


def loader_of(config: Any, trust_remote_code: bool = False) -> Any:
    """The class that makes or loads the model: one of transformers' auto classes, or the model's.

    Raises:
        BesaError: transformers knows no language model for the config, or code may not run.
    """
    remote = getattr(config, "auto_map", None) or {}
    for auto in _AUTO_CLASSES:
        if trust_remote_code and auto.__name__ in remote:
            return auto
    named = (getattr(config, "architectures", None) or [""])[0]
    known = [auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping]
    for auto in known:
        if auto._model_mapping[type(config)].__name__ == named:
            return auto
    if known:
        return known[0]
    # The decoder of a wrapper, stored alone, has a class but no place in the auto classes.
    kind = getattr(transformers, named, None)
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and _decodes(kind, config):
        return kind
    directory = Path(config.name_or_path)
    if any(auto.__name__ in remote for auto in _AUTO_CLASSES):
        raise _untrusted(directory)
    raise BesaError(
        f"{directory} is no causal language model: transformers has none for the model type "
        f"{config.model_type}"
    )


def new_model(config: Any, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The model of a config, without its weights; `options` as for `from_config`."""
    loader = loader_of(config, trust_remote_code)
    if issubclass(loader, PreTrainedModel):
        return loader._from_config(config, **options)
    model: PreTrainedModel = loader.from_config(
        config, trust_remote_code=trust_remote_code, **options
    )
    return model


def _decodes(kind: Any, config: Any) -> bool:
    return kind.can_generate() and not config.is_encoder_decoder


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """What a config.json says of how many layers or experts there are, parts of it included."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif isinstance(value, int) and _COUNTS.search(name):
            yield name, value


def _needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether transformers knows the model type only by code that lies beside the config."""
    try:
        return "AutoConfig" in (config.get("auto_map") or {}) and (
            config.get("model_type") not in CONFIG_MAPPING
        )
    except TypeError:
        return False  # transformers says what is wrong with the file


def _untrusted(directory: Path) -> BesaError:
    return BesaError(
        f"{directory} brings code of its own (auto_map in its config.json): read it, then give "
        "--trust-remote-code to run it"
    )
