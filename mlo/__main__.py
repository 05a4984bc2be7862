"""The command as `python -m mlo`."""

from mlo.cli.main import main

main()
