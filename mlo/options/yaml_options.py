"""Options as plain data: read from YAML files, merged, and named by dotted paths."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlo.errors import ConfigError

KIND = "kind"


def merge(base: Any, over: Any) -> Any:
    """``base`` updated with ``over``: mappings key by key, anything else replaced.

    A name means the same as a mapping with that ``kind``. Another ``kind`` drops the options of the one before.
    """
    if isinstance(over, str) and isinstance(base, Mapping) and KIND in base:
        over = {KIND: over}
    if not isinstance(over, Mapping):
        return over
    if isinstance(base, str):
        base = {KIND: base}
    if not isinstance(base, Mapping) or over.get(KIND, base.get(KIND)) != base.get(KIND):
        base = {}
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}


def nested(path: Sequence[str], value: Any) -> Any:
    """The mapping that holds a value under the parts of its dotted name."""
    for part in reversed(path):
        value = {part: value}
    return value


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found


def of_any_seed(value: Any, seed: int) -> Any:
    """A path with * in place of the seed, where it has the form that sweeps give it; anything else unchanged."""
    return re.sub(rf"\bseed([-=]){seed}(?!\d)", r"seed\1*", value) if isinstance(value, str) else value


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, or is neither a mapping nor empty.
    """
    import yaml  # here, because options are also checked where only the core is installed

    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(data, dict | None):
        raise ConfigError(f"{path}: should have lines like `name: value`, but holds {shown(data)}")
    return data or {}


def parse_yaml(text: str) -> Any:
    """The value of a YAML text."""
    import yaml

    from mlo.options.yaml_loader import Loader

    return yaml.load(text, Loader=Loader)


def shown(value: object) -> str:
    """A value as a user would write it, cut to a readable length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
