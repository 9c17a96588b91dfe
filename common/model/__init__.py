"""Language models as every role uses them: files, packed sequences, attention, heads. Runs anywhere."""
