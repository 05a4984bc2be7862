"""The command as `python -m mlo`."""

from mlo.cli import main

main()
