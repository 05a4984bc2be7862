"""The engine: which level steps when, updates, checkpoints and diagnostics."""
