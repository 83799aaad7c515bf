"""The layers of a compressed model, and the way back to dense ones."""
