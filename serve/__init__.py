"""`besa.serve`: will hold the vLLM plugin, the transformers quantizer, the server launcher and the
benchmark harness. None of them is there yet."""
