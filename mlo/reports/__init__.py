"""Comparisons of finished runs, and their tables and plots."""
