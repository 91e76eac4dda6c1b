"""Names as people read them: of models, methods and linears.

>>> short_name("/models/Llama-7b/"), hub_id("/models/Llama-7b/"), method_name("sparsegpt")
('Llama-7b', None, 'SparseGPT')
>>> recipe_name({"method": "besa", "update": "admm"})
'BESA + ADMM'
>>> short_names(["self_attn.q_proj", "mlp.up_proj"]), short_names(["attn.c_proj", "mlp.c_proj"])
(['q_proj', 'up_proj'], ['attn.c_proj', 'mlp.c_proj'])
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from besa.methods import METHODS, UPDATES


def method_name(method: object) -> str:
    """How the field writes a method; one that this version does not know stays as it is."""
    return METHODS.get(str(method), str(method))


def recipe_name(settings: Mapping[str, object]) -> str:
    """The method of a run's settings, and the update after it: BESA + ADMM."""
    update = str(settings.get("update", "none"))
    method = method_name(settings.get("method"))
    return method if update == "none" else f"{method} + {UPDATES.get(update, update)}"


def hub_id(model: str) -> str | None:
    """The Hugging Face id that a model argument or a cache folder stands for, if it is one."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", model)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return model if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model) else None


def short_name(model: str) -> str:
    """A model's name without the folders before it."""
    return hub_id(model) or re.split(r"[/\\]", model.rstrip("/\\"))[-1] or model


def short_names(names: Sequence[str]) -> list[str]:
    """`self_attn.q_proj` → `q_proj`, if that leaves every name its own."""
    last = [name.rsplit(".", 1)[-1] for name in names]
    return last if len(set(last)) == len(names) and "*" not in last else list(names)
