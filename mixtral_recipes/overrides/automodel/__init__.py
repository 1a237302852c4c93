"""NeMo AutoModel's recipe files, read as recipes."""
