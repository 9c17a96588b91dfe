"""Language models as every role computes with them: files, packed sequences, attention, heads. Runs anywhere."""
