"""Checkpoint folders: what is in them, how they are written, read, kept."""
