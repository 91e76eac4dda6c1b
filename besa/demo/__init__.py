"""A small trained Llama, its tokenizer and a corpus, so that besa shows itself anywhere.

>>> (MODEL / "model.safetensors").exists()
True

`MODEL` is the model's directory; benchmarks/train_demo.py made it. The corpus is the text that
every CPython brings (`besa.data.builtin`).
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
SEQLEN = 256  # what the model was trained at
