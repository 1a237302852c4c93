"""From settings to a run that can step, the loop around a step, and the step itself."""
