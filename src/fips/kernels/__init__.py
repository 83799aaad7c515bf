"""Products with packed factors: ``y = x S^T`` without forming S. Only this package knows hardware.

``reference`` is plain torch and defines the result; ``cpu`` and ``gpu`` (Triton) compute it from the packed bytes;
``runtime`` chooses the fastest way for a layer and a number of tokens, and ``timings`` remembers the choice in a file.
"""
