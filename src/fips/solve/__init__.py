"""Pure tensor maths: factorizations, supports and schedules. Knows no models and no files.

Shape legend: D width of the residual stream, F hidden features of one matrix, R rank of the shared basis.
"""
