"""Serves packed models: `besa serve`, the vLLM plugin, and packed linears in transformers."""
