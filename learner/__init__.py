"""From experience to new weights: the loop, the buffer, the maths of PPO, one update."""
