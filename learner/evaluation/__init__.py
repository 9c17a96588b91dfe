"""What an evaluation of several policies shows: pass@k, the crossover, their intervals. Runs in the driver."""
