"""SANA-WM definition, numpy-only parts at the top and the torch model under `sanawm.model`."""

__version__ = "0.1.0"
