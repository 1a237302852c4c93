"""Optimizers of recipes, under NeMo's names."""
