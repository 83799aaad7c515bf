"""Where fips meets other libraries."""
