"""Directories that are complete or absent, and reading what a stranger may have written."""
