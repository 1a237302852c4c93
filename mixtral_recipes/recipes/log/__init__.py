"""Where recipes write, under NeMo's names."""
