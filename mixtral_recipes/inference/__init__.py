"""Using a model that was trained: generation on Megatron under any layout, with a cache of keys and values."""
