"""From experience to new weights: the loop, the maths of PPO, one update. Runs in the driver and in every rank."""
