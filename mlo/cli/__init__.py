"""The command line: commands, options and help."""
