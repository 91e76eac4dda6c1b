"""transformers: its quantizer for packed checkpoints, and its server."""
