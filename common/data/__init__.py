"""Reads, checks and tokenises what users bring: prompts and preference pairs. Runs anywhere."""
