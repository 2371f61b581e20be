"""Training: the loop and its events, data with a position, optimizers and schedules, checkpoints that resume exactly."""
