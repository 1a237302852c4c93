"""NeMo's names and arguments, each with what becomes of it here: the one table, and what reads it."""
