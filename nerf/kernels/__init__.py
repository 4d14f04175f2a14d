"""Accelerations: the same functions, faster; none of them is required."""
