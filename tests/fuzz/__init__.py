"""Fuzzers change inputs from outside at random, from a seed. Each must end in a right value or one clear message.

Each target is a module with `prepare(directory)`, which makes what its cases share, and `case(rng, shared, scratch)`,
which changes one input and judges the outcome. A case is a function of its target's name and its seed:
`python -m tests.fuzz config:17` runs one again and shows what it did.
"""
