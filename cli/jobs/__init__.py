"""From options to a job."""
