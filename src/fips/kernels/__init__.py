"""Products with packed factors: ``y = x S^T`` without forming S. Only this package knows hardware.

``reference`` is plain torch and defines the result. ``backend`` says what a backend is, ``cpu`` (compiled C) and
``triton_kernel`` are two, ``registry`` lists them in order of preference; ``ops`` makes one torch operator of them all.
``runtime`` computes for one layer: ``select`` chooses among the ``ways``, ``timings`` remembers what they cost in a
file, ``call`` is one call and what can be used again in the next, ``basis`` multiplies by a dense basis. ``validity``
tells whether what was made from tensors still holds.
"""
