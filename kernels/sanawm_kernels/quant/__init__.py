"""Number formats of quantized operands: NVFP4 and FP8, exact in plain torch."""
