"""GGUF, the files of llama.cpp and Ollama: written from a checkpoint, checked against it."""
