"""A run: trainer and learner, its folder, lock, checkpoints and logs, and the processes that share it."""
