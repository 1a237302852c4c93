"""What every room stands on: home folder, files, locks, progress, ranks, quiet."""
