"""What `training.evaluate` and `training.ablate` are made of: test sets, metrics, baselines."""
