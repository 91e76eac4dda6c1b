"""How tokens are drawn where a request does not say: generation_config.json in GenAI's config.

>>> _ = Path("generation_config.json").write_text('{"do_sample": true, "repetition_penalty": 1.1}')
>>> sampling_of(Path())
{'do_sample': True, 'repetition_penalty': 1.1}

ONNX Runtime GenAI's builder takes some of it and drops the rest, the penalty of repetitions above
all; a standard graph's config has none of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from besa.model.files import GENAI_CONFIG
from besa.writing import write_text

# By the names that both sides give them.
_NAMES = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
)


def sampling_of(directory: Path) -> dict[str, Any]:
    """What a checkpoint's generation_config.json says of them; {} if there is none to be read."""
    try:
        config = GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError):
        return {}
    found = {name: getattr(config, name, None) for name in _NAMES}
    return {name: value for name, value in found.items() if value is not None}


def keep_sampling(directory: Path, out: Path) -> None:
    """Puts what the checkpoint in `directory` says into the genai_config.json in `out`."""
    path = out / GENAI_CONFIG
    described = json.loads(path.read_text(encoding="utf-8"))
    described["search"] |= sampling_of(directory)
    write_text(json.dumps(described, indent=4) + "\n", path)
