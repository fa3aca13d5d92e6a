"""Parts of `training.calibrate`."""
