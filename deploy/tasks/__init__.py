"""Prompts and reward functions of the shipped runs; each file is an example of writing one's own."""
