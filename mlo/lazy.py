"""Public names of a package that are imported when they are first used, so that importing the package costs nothing."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and the ``__dir__`` (PEP 562) of a package whose public names live in its modules.

    Args:
        package: its ``__name__``.
        homes: {module: its public names, separated by spaces}; a module without names is public itself, under the
            last part of its own name.

    Raises:
        ModuleNotFoundError: when a name is used whose module needs a package that is not installed; the message has
            the command that installs it.
    """
    module_of = {name: module for module, names in homes.items() for name in names.split()}
    public_modules = {module.rpartition(".")[2]: module for module, names in homes.items() if not names}

    def find(name: str) -> Any:
        module = public_modules.get(name) or module_of.get(name)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            from mlo.extras import explain_missing

            message = explain_missing(error, f"{package}.{name}")
            if message is None:
                raise
            raise ModuleNotFoundError(message, name=error.name) from error
        value = found if name in public_modules else getattr(found, name)
        setattr(sys.modules[package], name, value)  # the next use finds it without this function
        return value

    return find, lambda: sorted({*vars(sys.modules[package]), *module_of, *public_modules})
