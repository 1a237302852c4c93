"""NeMo 2.0's checkpoints, read without NeMo and without running anything that is in them."""
