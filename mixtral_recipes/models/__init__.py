"""Models on Megatron-Core."""
