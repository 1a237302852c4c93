"""Megatron-Core on a machine without a GPU: everything that pretends or patches."""
