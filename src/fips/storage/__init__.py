"""What is written to disk: packed factors (``packing``) and complete directories (``checkpoint``)."""
