"""What every role shares: configuration, the records that travel, models, weights, the journal."""
