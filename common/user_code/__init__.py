"""The user's Python functions: found, called, and what they raise. Runs anywhere."""
