"""One optional library each, imported only when used."""
