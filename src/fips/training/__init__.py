"""Compressed layers in training: block by block, or end to end."""
