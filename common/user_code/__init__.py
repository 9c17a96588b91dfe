"""The user's Python functions: found, called, their results read. Runs anywhere.

Worker processes of reward functions load `packages`, `errors`, `results` and `calls` by path, as a package of another
name (actors/scoring/function_worker.py). These four import the standard library and each other only, each other by
relative imports.
"""
