"""Runs that were started: records, states, logs."""
