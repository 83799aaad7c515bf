"""Products with packed factors: ``y = x S^T`` without forming S. Only this package knows hardware.

``reference`` is plain torch and defines the result; ``cpu`` and ``triton`` compute it from the packed bytes; ``choose``
measures which way is fastest for a layer and a number of tokens.
"""
