"""The video VAE's encoder on a single frame, channels-last."""
