"""One PPO update. Runs in each learner rank."""
