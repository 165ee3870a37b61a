"""Causal convolutions of the video VAE on channels-last frames, with what stands around them."""
