"""A random-weight Llama of besa's as GGUF, for llama.cpp to be measured beside it.

    python benchmarks/gguf_model.py DENSE OUT      # OUT/bf16.gguf, OUT/q8_0.gguf, OUT/q4_0.gguf

Runs where `llama-cpp-python` and `gguf` are installed, not where besa is: it reads safetensors by
itself. The rows of the query and key projections are not reordered as llama.cpp's own converter
does for its rotary embedding: weights that are random mean the same in any order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QUANTIZED = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name, as the 16-bit words of its bfloat16 values."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} of {directory} is {entry['dtype']}, not BF16")
            start, _ = entry["data_offsets"]
            shape = tuple(entry["shape"])
            yield name, np.memmap(path, np.uint16, "r", 8 + length + start, shape)


def gguf_name(name: str) -> str:
    """As llama.cpp calls it."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, block, part = stem.split(".", 3)
        return f"blk.{block}.{NAMES[part]}.weight"
    return f"{NAMES[stem]}.weight"


def write(directory: Path, out: Path) -> None:
    """The checkpoint in bfloat16; norms in float32, as llama.cpp wants them."""
    config = json.loads((directory / "config.json").read_text())
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(len(words))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    control = {0: gguf.TokenType.CONTROL}
    writer.add_token_types([control.get(i, gguf.TokenType.NORMAL) for i in range(len(words))])
    writer.add_token_merges(["Ġ w"])  # it asks for one
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    for name, bits in tensors(directory):
        if bits.ndim == 1:
            floats = (bits.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(gguf_name(name), floats)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), bits.view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, kind: int) -> None:
    """As `llama-quantize` does; every matrix in the same type."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.pure, parameters.nthread = kind, True, 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), parameters):
        raise SystemExit(f"{out} could not be written")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source = args.out / "bf16.gguf"
    if not source.exists():
        write(args.model, source)
    for name, kind in QUANTIZED.items():
        if not (args.out / f"{name}.gguf").exists():
            quantize(source, args.out / f"{name}.gguf", kind)


if __name__ == "__main__":
    sys.exit(main())
