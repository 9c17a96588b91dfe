"""Code that all roles share: configuration, data types, models, weights, metrics. Runs anywhere."""
