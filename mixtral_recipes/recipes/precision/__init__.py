"""Number formats of recipes, under NeMo's names."""
