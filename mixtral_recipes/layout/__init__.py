"""Parallel layouts and their arithmetic. Pure Python: loads no torch."""
