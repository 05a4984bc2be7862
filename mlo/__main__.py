"""The command, as `mlo` and as `python -m mlo`."""

import sys


def main() -> None:
    """Run the command; a package that is not installed, and Ctrl-C while it starts, end it with one line."""
    try:
        from mlo.cli.main import main as run_command

        run_command()
    except ModuleNotFoundError as error:
        from mlo.missing_packages import explain_missing

        message = explain_missing(error, f"`{_command()}`")
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _command() -> str:
    """The command and the name that it was given: `mlo run lbt`."""
    words = sys.argv[1:3]
    names = words[: next((index for index, word in enumerate(words) if word.startswith("-")), len(words))]
    return " ".join(["mlo", *names])


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder, which `mlo` does not search either: a problems.py in it would hide ours
    main()
