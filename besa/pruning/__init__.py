"""Pruning, block by block: which weights go, and what becomes of those that stay."""
