"""Methods written with mlo: each a problem that the framework itself knows nothing of."""
