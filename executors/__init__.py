"""Executors: where a job runs."""
