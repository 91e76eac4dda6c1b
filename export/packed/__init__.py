"""Packed checkpoints for vLLM and transformers, written and unpacked again."""
