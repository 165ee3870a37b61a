"""Torch definition of the model and checkpoint loading."""
