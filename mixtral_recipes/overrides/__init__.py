"""Recipes changed by text: dotted paths, YAML files, checks."""
