"""A saved run to its summary; two summaries to their differences."""
