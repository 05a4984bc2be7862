"""Public names of a package that are imported when they are first used, so that importing the package costs nothing."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and the ``__dir__`` (PEP 562) of a package whose public names live in its modules.

    Args:
        package: its ``__name__``.
        homes: {module or package: its public names, separated by spaces}. A name may be a module of that package.

    Raises:
        ModuleNotFoundError: when a name is used whose module needs a package that is not installed; the message has
            the command that installs it.
    """
    home_of = {name: home for home, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            home = import_module(home_of[name])
            found = vars(home)
            value = found[name] if name in found else import_module(f"{home_of[name]}.{name}")
        except ModuleNotFoundError as error:
            from mlo.missing_packages import explain_missing

            message = explain_missing(error, f"{package}.{name}")
            if message is None:
                raise
            raise ModuleNotFoundError(message, name=error.name) from error
        setattr(sys.modules[package], name, value)  # the next use finds it without this function
        return value

    return find, lambda: sorted({*vars(sys.modules[package]), *home_of})
