"""`besa.export`: will hold the packed checkpoint and the ONNX exporter. Neither is there yet."""
