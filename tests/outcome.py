"""What becomes of a tiny model of each type: pruned and loaded again, or refused, and why.

docs/families.md lists it, as of the transformers that the page names:

    HF_HUB_OFFLINE=1 python -m tests.outcome      # writes the page, in some minutes
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from besa.errors import BesaError
from besa.model.architecture import loader_of, read_config
from besa.pruning.config import PruneConfig
from besa.pruning.pipeline import PruneResult, prune_blocks
from tests.helpers import SENTENCES, byte_tokenizer, load_strictly, same_bytes, stored
from tests.tiny import tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "families.md"

# How the page calls each kind of outcome.
KINDS = {
    "pruned": "Pruned",
    "pruned-unread": "Pruned, but `besa eval` refuses them: they take no text without an image",
    "refused": "Refused, and what besa says",
    "untried": "Not tried: transformers makes no small model of their defaults here",
}

_TOKENS = 8


@dataclass(frozen=True)
class Outcome:
    """Of a tiny model of one type.

    Attributes:
        made: whether transformers makes such a model here of its config's defaults, shrunk.
        refused: what besa says where it does not prune it; None if it does.
        reads: whether what is pruned takes text alone, without an image.
    """

    made: bool
    refused: str | None = None
    reads: bool = True

    @property
    def kind(self) -> str:
        """Under which of `KINDS` the page lists it."""
        if not self.made:
            return "untried"
        if self.refused is not None:
            return "refused"
        return "pruned" if self.reads else "pruned-unread"


def outcome_of(model_type: str, seen: bool, directory: Path) -> Outcome:
    """Makes a model in `directory`, prunes it by Wanda, and asserts that what is loaded is right.

    Args:
        seen: of the wrapper that takes images, not of the text decoder alone.
    """
    try:
        model = tiny_model(model_type, seen)
    except Exception:  # noqa: BLE001 - libraries raise what their many layers raise
        return Outcome(made=False)
    dense, out = directory / "dense", directory / "pruned"
    model.save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    text = directory / "text.txt"
    text.write_text(SENTENCES)
    config = PruneConfig(
        out=out, method="wanda", samples=2, seqlen=8, calibration=str(text), device="cpu"
    )
    try:
        result = prune_blocks(dense, config)
    except BesaError as error:
        assert not out.exists()
        return Outcome(made=True, refused=_without_places(str(error), dense))
    return Outcome(made=True, reads=check(dense, result, type(model)))


def check(dense: Path, result: PruneResult, kind: type[nn.Module]) -> bool:
    """Asserts that a pruned model is the dense one with zeros, on disk and in transformers.

    Returns:
        Whether it takes text alone.
    """
    before, after = stored(dense), stored(result.out)
    assert after.keys() == before.keys()
    changed = [key for key in before if not same_bytes(before[key], after[key])]
    zeros = sum(int((after[key] == 0).sum()) for key in changed)
    found = result.record.sparsity
    assert zeros == found.zeros == round(found.weights / 2)
    assert sum(before[key].numel() for key in changed) == found.weights
    for key in changed:
        kept = after[key] != 0
        assert torch.equal(after[key][kept], before[key][kept]), key
    assert not [key for key in changed if re.search(r"vision|visual|audio|image", key)]

    pruned, original = _loaded(result.out), _loaded(dense)
    assert type(pruned) is kind
    assert {n for n, p in pruned.named_parameters() if (p == 0).any()}, "nothing is pruned"
    with torch.no_grad():
        for ours, theirs in zip(original.parameters(), pruned.parameters(), strict=True):
            ours *= theirs != 0
        tokens = torch.arange(3, 3 + 2 * _TOKENS).view(2, _TOKENS)
        try:
            logits = pruned(input_ids=tokens, use_cache=False).logits
        except (TypeError, ValueError):  # it wants an image
            return False
        assert logits.isfinite().all()
        assert torch.equal(logits, original(input_ids=tokens, use_cache=False).logits)
    return True


def _loaded(directory: Path) -> Any:
    """The stock model, a wrapper by the class that loads wrappers."""
    return load_strictly(directory, loader_of(read_config(directory)))


def _without_places(message: str, dense: Path) -> str:
    """A message as it is for any directory."""
    return message.replace(str(dense), "MODEL")


# ---------------------------------------------------------------------------------- the page


def types_of(seen: bool) -> list[str]:
    """The model types that the installed transformers knows, with text or with images, too."""
    from transformers.models.auto import modeling_auto as auto

    names = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if seen else None
    return sorted(names or auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def page_of(outcomes: dict[str, dict[str, Outcome]], version: str) -> str:
    """The page, from the outcomes of each part by model type."""
    decoders, wrappers = outcomes["decoders"], outcomes["wrappers"]
    lines = [
        "# Model families",
        "",
        f"Of the {len(decoders)} types of causal language models that transformers {version} "
        f"knows, besa prunes {_pruned(decoders)}; of the {len(wrappers)} that take images and give "
        f"text, {_pruned(wrappers)}. Each was made tiny, pruned by Wanda and loaded again by "
        "transformers: every zero is where it should be, nothing else has changed, and the logits "
        "are those of the dense model with these zeros. The suite does it again "
        "(`tests/pruning/test_every_type.py`), and `HF_HUB_OFFLINE=1 python -m tests.outcome` "
        "writes this page.",
        "",
        "besa knows none of them by name: blocks and linears are found by type and shape. A type "
        "that is not here may well work.",
    ]
    for part, title in (
        ("decoders", "Text decoders"),
        ("wrappers", "Text decoders inside of models that see"),
    ):
        lines += ["", f"## {title}"]
        if part == "wrappers":
            lines += [
                "",
                "The text decoder is pruned, on text. Vision towers and projectors are copied as "
                "they are.",
            ]
        for kind, words in KINDS.items():
            of_kind = {name: o for name, o in outcomes[part].items() if o.kind == kind}
            if not of_kind:
                continue
            if kind == "refused":
                lines += ["", f"{words}:", ""]
                lines += [f"- `{name}`: {outcome.refused}" for name, outcome in of_kind.items()]
            else:
                lines += ["", f"{words}: " + ", ".join(f"`{name}`" for name in of_kind) + "."]
    return "\n".join(lines) + "\n"


def _pruned(outcomes: dict[str, Outcome]) -> int:
    return sum(outcome.kind.startswith("pruned") for outcome in outcomes.values())


def listed(page: str) -> dict[str, dict[str, tuple[str, str | None]]]:
    """What the page says: by part and model type, the kind of outcome and the reason."""
    found: dict[str, dict[str, tuple[str, str | None]]] = {}
    parts = page.split("\n## ")[1:]
    for part, text in zip(("decoders", "wrappers"), parts, strict=True):
        own = found[part] = {}
        for line in text.splitlines():
            reason = re.fullmatch(r"- `([^`]+)`: (.*)", line)
            if reason:
                own[reason[1]] = "refused", reason[2]
            for kind, words in KINDS.items():
                if line.startswith(f"{words}: "):
                    names = re.findall(r"`([^`]+)`", line.removeprefix(words))
                    own.update(dict.fromkeys(names, (kind, None)))
    return found


def _write_page() -> None:
    import tempfile

    import transformers

    transformers.logging.set_verbosity_error()
    outcomes: dict[str, dict[str, Outcome]] = {"decoders": {}, "wrappers": {}}
    for part, of_part in outcomes.items():
        for name in types_of(seen=part == "wrappers"):
            with tempfile.TemporaryDirectory() as directory:
                of_part[name] = outcome_of(name, part == "wrappers", Path(directory))
    PAGE.write_text(page_of(outcomes, transformers.__version__))


if __name__ == "__main__":
    _write_page()
