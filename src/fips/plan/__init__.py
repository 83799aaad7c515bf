"""Layers, groups and exact bytes before any work, on the meta device."""
