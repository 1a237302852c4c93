"""Looking a data set over."""
