"""Figures of an evaluation of several policies: pass@k, the crossover, their intervals. Runs in the driver."""
