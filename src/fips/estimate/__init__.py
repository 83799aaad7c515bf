"""What a compression will take, told before the weights are read: memory, operations, time."""

from fips.estimate.memory import MemoryNeed, available_memory, calibration_memory
from fips.estimate.time import Operations, Speed, operations, timed_dtype

__all__ = ["MemoryNeed", "Operations", "Speed", "available_memory", "calibration_memory", "operations", "timed_dtype"]
