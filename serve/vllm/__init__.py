"""vLLM: the plugin that loads packed checkpoints."""
