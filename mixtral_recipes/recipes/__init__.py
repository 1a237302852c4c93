"""Recipes: one module each, returning configs."""
