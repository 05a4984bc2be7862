"""The training loop: the engine, its updates, checkpoints and diagnostics."""
