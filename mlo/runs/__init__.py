"""Jobs and run folders: stages, checkpoints, metrics, progress and cost."""
