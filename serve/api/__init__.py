"""The OpenAI-compatible API of besa's own servers: one application over two engines."""
