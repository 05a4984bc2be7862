"""Many runs: grids of options, seeds, worker processes, experiments."""
