"""Texts, and the windows of tokens that they are cut into."""
