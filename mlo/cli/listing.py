"""`mlo list`: everything that can be named in an option."""

from mlo.cli.help import summary_of
from mlo.options import registry


def list_all() -> None:
    """List jobs, experiments, estimators, curvature products."""
    for group, written in registry.WRITTEN.items():
        names = registry.entries(group)
        print(f"{registry.TITLES[group]}: {written}")
        for name in names:
            print(f"  {name:<{max(map(len, names))}}  {summary_of(group, name)}")
        print("" if names else "  (none)\n")
