"""Conversion in both directions, and its checks."""
