"""Typed options, YAML files, and the registry of names."""
