"""Hugging Face's side: config.json, weight files, the Hub."""
