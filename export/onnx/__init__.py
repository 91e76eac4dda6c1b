"""ONNX graphs of a checkpoint, dense or on packed weights."""
