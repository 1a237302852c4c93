"""Samples into what the model is fed."""
