"""An error where a user's module hides a package of ours that has the same name."""

from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

from mlo.errors import ConfigError
from mlo.extras import DISTRIBUTION

INSTALLED = Path(__file__).resolve().parents[2]  # the folder that holds mlo, and all packages of its distribution


def check_not_hidden(entry: EntryPoint) -> None:
    """Raise a ConfigError if importing one of our entry points would import another package of that name.

    That happens where a folder that comes earlier on Python's path has, for example, a `problems.py`. Nothing is
    imported here.
    """
    if entry.dist is None or entry.dist.name != DISTRIBUTION:
        return
    package = entry.module.partition(".")[0]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return
    file = Path(spec.origin).resolve()
    found = file.parent if spec.submodule_search_locations else file
    if found.parent != INSTALLED:
        raise ConfigError(
            f"{found} hides the package {package!r} of {DISTRIBUTION}, which is in {INSTALLED}; rename yours, or "
            f"remove {found.parent} from PYTHONPATH"
        )
