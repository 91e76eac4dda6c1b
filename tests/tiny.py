"""A tiny config of any model that transformers knows, made from the defaults of its config class.

>>> tiny_config("llama").hidden_size
32

Sizes are shrunk by what their fields are called, here and in the config's parts (text, vision).
What a family needs beyond that is in `OWN`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from tests.helpers import VOCABULARY

# The first rule whose expression is found in a field's name gives its value.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"^(bos|eos)_token_id$", 0),
    (r"^(pad|sep|cls|decoder_start)_token_id$", 1),
    (r"_token_(id|index)$|^im_\w+_id$", None),  # see `_small`
    (r"^rotary_dim$", 4),
    (r"rope_head_dim", 8),
    (r"nope_head_dim|v_head_dim|index_head_dim|resampler_head_dim|resampler_dim_head", 8),
    (r"(num_)?(key_value|kv|ngroups|n_groups|key)_heads$|^linear_num_key_heads$", 2),
    (r"heads?$|^n_head$", 4),
    (r"^n_group$|^topk_group$", 1),
    (r"head_dim|head_size|dim_head|^d_kv$|^kv_channels$", 8),
    (r"lora_rank|_rank$|lowrank", 8),
    (r"vocab", VOCABULARY),
    (r"experts_per_tok|topk$|top_k$|^moe_k$", 2),
    (r"experts$|^zero_expert_num$", 4),
    (r"^out_hidden_size$|^output_dim$|^projection_dim$", 32),
    (r"num_.*layers$|^n_layers?$|_layers$|^layers$|^depth$|^num_blocks$", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target", 64),
    (r"sliding_window|window_size|local_attention|attention_chunk_size", 8),
    (r"image_size|^resolution$|^crop_size$", 28),
    (r"^patch_size$", 14),
    (r"intermediate_size|ffn|mlp_dim|^d_ff$|^dff$|^dim_ff$|^d_inner$|feed_forward_size", 48),
    (r"hidden_size|embed_dim|d_model|n_embd|emb_dim|embedding_size|^dim$|_dim$", 32),
    (r"state_size|d_state", 8),
    (r"chunk_size|chunk_length|block_size", 8),
    (r"_channels$|channel$", 32),
)


def _merged(settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with `more` in their place, part by part."""
    merged = dict(settings)
    for name, value in more.items():
        known = merged.get(name)
        nested = isinstance(value, Mapping) and isinstance(known, Mapping)
        merged[name] = _merged(known, value) if nested else value
    return merged


_HEADS = {"head_dim": 8}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}}
_COMPASS = {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [1, 1, 2]}}}
_VQ = {"channel_multiplier": [1, 1], "num_embeddings": 64}
_MOE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
_GEMMA_3N = {**_MIXED, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]}
_HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
# What the rules do not make of a family's config, by model_type; nested by the config's parts.
OWN: dict[str, dict[str, Any]] = {
    "chameleon": {"vq_config": _VQ, "vocabulary_map": {"<image>": 4}},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_ocr2": {"text_config": {**_MOE, "mlp_layer_types": ["dense", "sparse"]}},
    "deepseek_v2": {"first_k_dense_replace": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "deepseek_v4": {
        "hc_mult": 1,
        "o_groups": 2,
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    },
    "dots1": _MOE,
    "emu3": {"vq_config": _VQ, "vocabulary_map": {"<image>": 4}},
    "ernie4_5_vl_moe": _merged(_MROPE, {"text_config": {"moe_intermediate_size": [16, 16]}}),
    "falcon_mamba": {"state_size": 4},
    "gemma3n": {"text_config": _GEMMA_3N},
    "gemma4": {
        "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    },
    "gemma3n_text": _GEMMA_3N,
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [0, 1, 1]}}},
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "glm5_next": {"text_config": {"index_kpool": 1, "hc_mult": 1}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"text_config": {"model_type": "granite4_vision_text"}},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "hunyuan_vl": _merged(_MROPE, {"text_config": _HEADS}),
    "hy_v4": {"hc_mult": 1},
    "jamba": {"mamba_d_state": 4},
    "janus": {"vq_config": _VQ},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8},
    "ministral": _HEADS,
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8},
    "nemotron_h_omni": {
        "text_config": {"n_groups": 2, "mamba_num_heads": 8},
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "paddleocr_vl": _MROPE,
    "qwen2_5_omni_thinker": _MROPE,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "recurrent_gemma": {"intermediate_size": 480},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xlnet": {"n_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The config of a tiny model: two blocks or a few, 32 wide."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    own = _merged(OWN.get(model_type, {}), changes)
    return kind(**_merged(tiny_settings(kind), own))


def tiny_settings(kind: type[Any]) -> dict[str, Any]:
    """Keyword arguments for a config class, with those of its parts."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = field.default
        if isinstance(value, int) and not isinstance(value, bool) and value > 2:
            small = _small(field.name)
            if small is not None:
                settings[field.name] = min(small, value)
    if kind.sub_configs and not kind.has_no_defaults_at_init:
        usual = kind()
        for name in kind.sub_configs:
            part = getattr(usual, name, None)
            if part is not None:
                settings[name] = {**tiny_settings(type(part)), "model_type": part.model_type}
    if "kv_lora_rank" in settings:  # latent attention has a key for each query's head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    rope = getattr(kind() if not kind.has_no_defaults_at_init else None, "rope_parameters", None)
    if "mrope_section" in (rope or ()):  # of the numbers of a head, a quarter each and a half
        half = settings.get("head_dim", 8) // 2
        settings["rope_parameters"] = {**rope, "mrope_section": [half // 4, half // 4, half // 2]}
    return settings


def _small(name: str) -> int | None:
    """The value of a field by the rules; None where there is none.

    Token ids that mean something to a wrapper are letters that no text of the tests has.
    """
    for expression, small in _RULES:
        if re.search(expression, name):
            return small if small is not None else 200 + sum(name.encode()) % 50
    return None


def tiny_model(model_type: str, seen: bool = False, **changes: Any) -> Any:
    """A tiny model with random weights, biases and norms too.

    Args:
        seen: of the wrapper that takes images, not of the text decoder alone.
        changes: to the config, part by part.

    Raises:
        Exception: whatever transformers says where it makes no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if seen else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = 0.1 * torch.randn_like(parameter)
                parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.eval()
