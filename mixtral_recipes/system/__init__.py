"""What everything else builds on: home folder, files, locks, progress, ranks, quiet."""
