"""The jobs that `mlo run` starts: `lbt` and `evaluate`, and their report."""
