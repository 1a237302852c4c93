"""Data modules, one per kind of data."""
