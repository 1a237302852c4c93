"""Adapters in peft's form: written so that peft and vLLM load them, and read back."""
