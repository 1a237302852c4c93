"""Pages and pictures about a run that was recorded. Loads no torch."""
