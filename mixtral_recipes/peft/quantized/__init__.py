"""Frozen weights in 4 or 8 bits, as bitsandbytes has them, and the layers that multiply with them."""
