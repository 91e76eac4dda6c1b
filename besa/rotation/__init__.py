"""Rotations that leave a model's function as it is, and make its weights easier to prune."""
