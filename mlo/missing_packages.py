"""A package that is not installed, named with the command that installs it."""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires

DISTRIBUTION = "mlo-torch"
INSTALLED_AS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}  # modules whose distribution has another name


def explain_missing(error: ModuleNotFoundError, what: str) -> str | None:
    """One line for people: what ``what`` needs, and how to install it; None if mlo does not require the module.

    The extra is looked up in mlo's own metadata: the smallest one that has the package.
    """
    module, _, part = (error.name or "").partition(".")
    if part and sys.modules.get(module):  # the package is there, and has no such part
        return None
    package = _normalized(INSTALLED_AS.get(module, module))
    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # mlo is used from its folder without being installed
        return None
    packages_of: dict[str, set[str]] = {}  # of each extra; "" has what is always required
    for requirement in requirements:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        packages_of.setdefault(extra[1] if extra else "", set()).add(_normalized(name))
    extras = [extra for extra, packages in packages_of.items() if package in packages]
    if not extras:
        return None
    smallest = min(extras, key=lambda extra: (extra != "", len(packages_of[extra])))
    target = f"'.[{smallest}]'" if smallest else "."
    return f"{what} needs {package}, which is not installed; in your clone of mlo, run: pip install {target}"


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-")
