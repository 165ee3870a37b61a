"""The transformer's programs with quantized weights and activations as ONNX graphs."""

from sanawm_export.quantized.export import export_quantized
from sanawm_export.quantized.formats import graph_formats

__all__ = ["export_quantized", "graph_formats"]
