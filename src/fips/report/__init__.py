"""What a compression did: a JSON-able record and tables for a terminal."""

from fips.report.record import CompressionReport, GroupResult, environment

__all__ = ["CompressionReport", "GroupResult", "environment"]
