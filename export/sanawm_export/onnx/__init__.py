"""The compiled programs as ONNX graphs."""
