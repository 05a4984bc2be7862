"""Finding problems, estimators and experiments by name: entry points, the same door for ours and for anyone's."""

import difflib
import platform
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, TypeVar

from mlo.errors import ConfigError

PROBLEMS = "mlo.problems"
ESTIMATORS = "mlo.estimators"
PRODUCTS = "mlo.products"
EXPERIMENTS = "mlo.experiments"
WRITTEN = {
    PROBLEMS: "mlo run NAME",
    EXPERIMENTS: "mlo reproduce NAME",
    ESTIMATORS: "--hypergradient NAME",
    PRODUCTS: "--hypergradient.product NAME",
}

T = TypeVar("T")


def entries(group: str) -> dict[str, EntryPoint]:
    """All that is registered in an entry-point group, by name and in order of names; nothing is imported."""
    return {entry.name: entry for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)}


def load(group: str, name: str) -> Any:
    """The object registered under a name in an entry-point group.

    Raises:
        ConfigError: the name is not registered, is registered twice for different objects, or cannot be imported.
    """
    targets = sorted({entry.value for entry in entry_points(group=group, name=name)})
    if not targets:
        raise ConfigError(unknown(name, entries(group), f"among {group}{_elsewhere(name)}"))
    if len(targets) > 1:
        raise ConfigError(
            f"{name!r} is registered in {group} for {' and for '.join(targets)}; uninstall the package of one of them"
        )
    entry = entries(group)[name]
    try:
        return entry.load()
    except Exception as error:
        raise ConfigError(
            f"{name!r} is registered in {group} as {entry.value}, which cannot be loaded "
            f"({type(error).__name__}: {error}); mend or reinstall the package that registers it"
        ) from error


def _elsewhere(name: str) -> str:
    """Where else a name is known, and how it is written there."""
    others = [f"{group} ({how.replace('NAME', name)})" for group, how in WRITTEN.items() if name in entries(group)]
    return f", but among {' and '.join(others)}" if others else ""


def load_class(group: str, name: str, base: type[T]) -> type[T]:
    """The class derived from ``base`` that is registered under a name.

    Raises:
        ConfigError: as :func:`load`, and if it is no such class.
    """
    found = load(group, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        needed = f"{base.__module__}.{base.__qualname__}"
        raise ConfigError(f"{name!r} is registered in {group} as {found!r}; register a class derived from {needed}")
    return found


def unknown(name: str, valid: Iterable[str], where: str) -> str:
    """A sentence for people: the name is not one of the valid ones; which is nearest, and which there are."""
    names = list(valid)
    guess = nearest(name, names)
    hint = f"did you mean {guess}? " if guess else ""
    listing = f"there are: {', '.join(names)}" if names else "nothing is registered there; is the package installed?"
    return f"{name!r} is not known {where}; {hint}{listing}"


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that was probably meant, if one is near enough."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def summary(thing: object) -> str:
    """The first line of an object's docstring."""
    return (thing.__doc__ or "").strip().partition("\n")[0]


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on, read without importing any of it."""
    return {"mlo": version("mlo-torch"), "torch": version("torch"), "python": platform.python_version()}
