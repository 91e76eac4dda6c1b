"""ONNX Runtime GenAI behind the same API."""
