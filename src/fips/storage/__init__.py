"""Compressed directories: the layout in `config.json`, loading and saving, what transformers needs beside weights."""
