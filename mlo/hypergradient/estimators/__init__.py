"""Estimators: how a cotangent of a lower problem's solution is pulled back through its training; a file a family."""
