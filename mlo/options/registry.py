"""Jobs, experiments, estimators and products by name, found through entry points: ours in the same way as yours."""

import ast
import difflib
import json
import platform
import sys
from collections.abc import Iterable
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any, TypeVar

from mlo.errors import ConfigError
from mlo.missing_packages import explain_missing

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

TITLES = {
    PROBLEMS: "Jobs",
    EXPERIMENTS: "Experiments",
    ESTIMATORS: "Estimators",
    PRODUCTS: "Curvature products",
}

T = TypeVar("T")


@cache
def _entry_points(group: str, paths: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """All entries of a group that are found on ``sys.path``, sorted by name. Finding them takes milliseconds."""
    return tuple(sorted(entry_points(group=group), key=lambda entry: entry.name))


def entries(group: str) -> dict[str, EntryPoint]:
    """All entries of an entry-point group, sorted by name; nothing is imported."""
    return {entry.name: entry for entry in _entry_points(group, tuple(sys.path))}


def load(group: str, name: str) -> Any:
    """The object registered under a name in an entry-point group.

    Raises:
        ConfigError: the name is not registered, is registered twice for different objects, cannot be imported, or
            another package hides the one that it is in.
    """
    entry = _entry(group, name)
    try:
        return entry.load()
    except Exception as error:
        missing = explain_missing(error, repr(name)) if isinstance(error, ModuleNotFoundError) else None
        raise ConfigError(
            missing
            or f"{name!r} is registered in {group} as {entry.value}, which cannot be loaded "
            f"({type(error).__name__}: {error}); repair or reinstall the package that registers it"
        ) from error


def _entry(group: str, name: str) -> EntryPoint:
    """The entry of a name, checked as :func:`load` says as far as that is possible without importing it."""
    found = {entry.value: entry for entry in _entry_points(group, tuple(sys.path)) if entry.name == name}
    if not found:
        raise ConfigError(unknown(name, entries(group), f"among {group}{_elsewhere(name)}"))
    if len(found) > 1:
        targets = " and for ".join(sorted(found))
        raise ConfigError(f"{name!r} is registered in {group} for {targets}; uninstall the package of one of them")
    (entry,) = found.values()
    if hiding := _hiding(entry):
        raise ConfigError(
            f"{name!r} is registered in {group} as {entry.value}, but {hiding} hides that package; rename that file or "
            "folder, or take it off PYTHONPATH"
        )
    return entry


def _hiding(entry: EntryPoint) -> str | None:
    """A file that would be imported instead of the entry's own package, because it is earlier on sys.path; else None.

    The entry's own package is below the folder that its distribution is installed in, or, if it is editable, below the
    project's folder.
    """
    package = entry.module.partition(".")[0]
    specs = [PathFinder.find_spec(package, [folder]) for folder in sys.path]
    files = list(dict.fromkeys(spec.origin for spec in specs if spec and spec.origin))
    if entry.dist is None or len(files) < 2:
        return None
    from urllib.parse import urlsplit
    from urllib.request import url2pathname  # takes long to import

    url = json.loads(entry.dist.read_text("direct_url.json") or "{}").get("url", "")
    folders = [Path(str(entry.dist.locate_file(""))), *([Path(url2pathname(urlsplit(url).path))] if url else [])]
    own = [file for file in files if any(Path(file).is_relative_to(folder) for folder in folders)]
    copy = Path(files[0]).parents[1].joinpath(*entry.module.split(".")).with_suffix(".py")  # a clone may stand in front
    return files[0] if own and files[0] not in own and not copy.exists() else None


def _elsewhere(name: str) -> str:
    """In which other groups the name is registered, and how it is used there."""
    others = [f"{group} ({how.replace('NAME', name)})" for group, how in WRITTEN.items() if name in entries(group)]
    return f", but among {' and '.join(others)}" if others else ""


def load_class(group: str, name: str, base: type[T]) -> type[T]:
    """The class derived from ``base`` that is registered under a name.

    Raises:
        ConfigError: as :func:`load`, and if it is not such a class.
    """
    found = load(group, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        needed = f"{base.__module__}.{base.__qualname__}"
        raise ConfigError(f"{name!r} is registered in {group} as {found!r}; register a class derived from {needed}")
    return found


def unknown(name: str, valid: Iterable[str], where: str) -> str:
    """A sentence for people: the name is not one of the valid ones; the nearest valid one, and all of them."""
    names = list(valid)
    guess = nearest(name, names)
    hint = f"did you mean {guess}? " if guess else ""
    listing = f"there are: {', '.join(names)}" if names else "nothing is registered there; is the package installed?"
    return f"{name!r} is not known {where}; {hint}{listing}"


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that was probably meant; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def summary(thing: object) -> str:
    """The first line of an object's docstring."""
    return (thing.__doc__ or "").strip().partition("\n")[0]


def summary_of(group: str, name: str) -> str:
    """The first line of the docstring of what is registered under a name; a class in a source file is not imported.

    Raises:
        ConfigError: as :func:`load`, where the object has to be loaded.
    """
    found = _class_docstring(_entry(group, name))
    return summary(load(group, name)) if found is None else found.partition("\n")[0]


def _class_docstring(entry: EntryPoint) -> str | None:
    """The docstring of a class, read from its source; None if there is no source, or no such class in it.

    The file is looked for part by part of the module's name, so that no parent package is imported.
    """
    spec, name = None, ""
    for part in entry.module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, spec.submodule_search_locations if spec else None)
        if spec is None:
            return None
    source = Path(spec.origin if spec and spec.origin else "")
    if source.suffix != ".py":
        return None
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError):
        return None
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == entry.attr]
    return ast.get_docstring(classes[-1]) or "" if classes else None


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on; none of it is imported."""
    return {"mlo": version("mlo-torch"), "torch": version("torch"), "python": platform.python_version()}
