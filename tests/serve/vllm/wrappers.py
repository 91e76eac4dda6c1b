"""Tiny models that see, with the files by which vLLM prepares images: only texts are given to them.

A family's processor is of transformers' own classes. Names of weights are those of the families'
published checkpoints, which vLLM goes by.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.tiny import tiny_model

VOCABULARY, FIRST_SPECIAL = 320, 280

TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 160,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_TURNED = {**TEXT, "rope_parameters": _ROPE}
SHAPES: dict[str, dict[str, Any]] = {
    "aya_vision": TEXT,
    "gemma3": {**TEXT, "query_pre_attn_scalar": 32},
    "idefics3": TEXT,
    "internvl": TEXT,
    "llama4": {
        **TEXT,
        "attention_chunk_size": 128,
        "intermediate_size": 64,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
    },
    "llava": TEXT,
    "mistral3": TEXT,
    "paligemma": TEXT,
    "qwen2_5_vl": _TURNED,
    "qwen3_vl": _TURNED,
    "qwen3_vl_moe": {
        **_TURNED,
        "moe_intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
# vLLM's module of these needs no torchvision, nor does the processor.
WITHOUT_TORCHVISION = ("idefics3",)


def _tokenizer(**special: str) -> Any:
    """Of words that are numbers, of lines' ends, and of the special tokens, by their names."""
    words = ["<end>", "<unknown>", *("\n" * count for count in range(1, 5))]
    words += [str(number) for number in range(len(words), FIRST_SPECIAL)]
    words += special.values()
    words += [str(number) for number in range(len(words), VOCABULARY)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<end>",
        eos_token="<end>",
        unk_token="<unknown>",
        pad_token="<unknown>",
        extra_special_tokens=special,
    )


def _square(config: Any) -> dict[str, int]:
    size = config.vision_config.image_size
    size = size if isinstance(size, int) else size[0]
    return {"height": size, "width": size}


def _aya_vision(config: Any) -> Any:
    images = transformers.GotOcr2ImageProcessor(size=_square(config))
    return transformers.AyaVisionProcessor(
        images,
        _tokenizer(image_token="<image>"),
        patch_size=config.vision_config.patch_size,
        img_size=config.vision_config.image_size,
    )


def _gemma3(config: Any) -> Any:
    tokenizer = _tokenizer(image_token="<soft>", boi_token="<start>", eoi_token="<stop>")
    images = transformers.Gemma3ImageProcessor(size=_square(config))
    config.mm_tokens_per_image = 4
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _idefics3(config: Any) -> Any:
    size = {"longest_edge": config.vision_config.image_size}
    images = transformers.Idefics3ImageProcessor(size=size, max_image_size=size)
    return transformers.Idefics3Processor(
        images, _tokenizer(image_token="<image>"), image_seq_len=1
    )


def _internvl(config: Any) -> Any:
    size = _square(config)
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size),
        _tokenizer(
            context_image_token="<context>",
            start_image_token="<img>",
            end_image_token="</img>",
            video_token="<video>",
        ),
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=config.image_seq_length,
    )


def _llama4(config: Any) -> Any:
    names = ("image_start", "image_end", "image", "tile_x_separator", "tile_y_separator")
    return transformers.Llama4Processor(
        transformers.Llama4ImageProcessor(size=_square(config)),
        _tokenizer(image_token="<|patch|>", **{name: f"<|{name}|>" for name in names}),
        patch_size=config.vision_config.patch_size,
        pixel_shuffle_ratio=config.vision_config.pixel_shuffle_ratio,
    )


def _llava(config: Any) -> Any:
    size = config.vision_config.image_size
    config.image_seq_length = (size // config.vision_config.patch_size) ** 2
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=_square(config)),
        _tokenizer(image_token="<image>"),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )


def _mistral3(config: Any) -> Any:
    patch = config.vision_config.patch_size
    size = {"longest_edge": config.vision_config.image_size}
    return transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(patch_size=patch, size=size),
        _tokenizer(
            image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]"
        ),
        patch_size=patch,
        spatial_merge_size=config.spatial_merge_size,
    )


def _paligemma(config: Any) -> Any:
    images = transformers.SiglipImageProcessor(size=_square(config))
    images.image_seq_length = (
        config.vision_config.image_size // config.vision_config.patch_size
    ) ** 2
    return transformers.PaliGemmaProcessor(images, _tokenizer(image_token="<image>"))


def _qwen_vl(processor: str, videos: str) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        vision = config.vision_config
        settings = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "size": {
                "shortest_edge": (2 * vision.patch_size) ** 2,
                "longest_edge": (4 * vision.patch_size) ** 2,
            },
        }
        tokenizer = _tokenizer(
            image_token="<|image_pad|>",
            video_token="<|video_pad|>",
            vision_start_token="<|vision_start|>",
            vision_end_token="<|vision_end|>",
        )
        config.video_token_id = tokenizer.video_token_id
        config.vision_start_token_id = tokenizer.vision_start_token_id
        config.vision_end_token_id = tokenizer.vision_end_token_id
        images = transformers.Qwen2VLImageProcessor(**settings)
        known: Any = transformers
        return getattr(known, processor)(images, tokenizer, getattr(known, videos)(**settings))

    return make


PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "aya_vision": _aya_vision,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llama4": _llama4,
    "llava": _llava,
    "mistral3": _mistral3,
    "paligemma": _paligemma,
    "qwen2_5_vl": _qwen_vl("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": _qwen_vl("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": _qwen_vl("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


def save_wrapper(family: str, directory: Path, change: Callable[[Any], None]) -> None:
    """Writes a family's model, which `change` has been given, its processor and its tokenizer."""
    model = tiny_model(family, seen=True, text_config=SHAPES[family])
    change(model)
    processor = PROCESSORS[family](model.config)
    # All families' first special token is what stands for an image.
    model.config.image_token_id = model.config.image_token_index = FIRST_SPECIAL
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = {
        _published(name, model.config): _as_published(name, family, tensor)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _published(name: str, config: Any) -> str:
    """SigLIP's and CLIP's towers have a model within, whose name transformers 5 leaves out."""
    if config.vision_config.model_type not in ("siglip_vision_model", "clip_vision_model"):
        return name
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def _as_published(name: str, family: str, tensor: torch.Tensor) -> torch.Tensor:
    """Qwen3-VL's experts are stored transposed; transformers loads them as they come."""
    transposed = family == "qwen3_vl_moe" and "experts" in name
    return tensor.mT.contiguous() if transposed else tensor
