"""Gated delta network over the frames of a chunk, main and camera branches."""
