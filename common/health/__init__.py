"""What goes wrong in a run, found by rules over its metrics. Runs anywhere."""
