"""Prompts and reward functions of the shipped runs, which are examples for your own.

Runs in the driver, and in each reward replica.
"""
