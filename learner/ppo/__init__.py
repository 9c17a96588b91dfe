"""One PPO update. Runs in every learner rank."""
