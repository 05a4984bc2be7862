"""Estimators: how a cotangent is pulled back through the training of a lower problem. One file per family."""
