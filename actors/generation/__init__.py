"""Generators: the engine, its weights, and the class that turns prompts into rollouts. Runs in each generator."""
