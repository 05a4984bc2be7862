"""Attacks on runs: processes that are killed, files that are damaged, and bad options, YAML files and data."""
