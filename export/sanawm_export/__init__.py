"""From checkpoint to engine bundle: ONNX programs, engines, `build-engine`."""
