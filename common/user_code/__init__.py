"""Finds and calls the user's Python functions, and reads their results. Runs anywhere.

Worker processes of reward functions load `packages`, `errors`, `results` and `calls` by path, under another package
name (actors/scoring/function_worker.py). So these four import only the standard library and, by relative imports, each
other.
"""
