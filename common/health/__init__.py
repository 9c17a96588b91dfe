"""Rules over the metrics of a run that find what goes wrong in it. Runs anywhere."""
