"""Where a model comes from: what every checkpoint, adapter and export records of itself, and how a link is compared."""
