"""Options as plain data: read from YAML files, laid over one another, named by dotted paths."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlo.errors import ConfigError

KIND = "kind"


def merge(base: Any, over: Any) -> Any:
    """``over`` laid on ``base``: mappings key by key, anything else replaced.

    A bare name and a mapping with that ``kind`` are the same thing; another ``kind`` begins anew.
    """
    if isinstance(over, str) and isinstance(base, Mapping) and KIND in base:
        over = {KIND: over}
    if not isinstance(over, Mapping):
        return over
    if isinstance(base, str):
        base = {KIND: base}
    if not isinstance(base, Mapping) or (KIND in over and over[KIND] != base.get(KIND)):
        base = {}
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}


def nested(path: Sequence[str], value: Any) -> Any:
    """The value of an option below the parts of its dotted name."""
    for part in reversed(path):
        value = {part: value}
    return value


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    items = [
        flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
        for name, value in options.items()
    ]
    return {name: value for item in items for name, value in item.items()}


def of_any_seed(value: Any, seed: int) -> Any:
    """A path with a * for the seed, where that stands as sweeps and experiments write it; anything else as it is."""
    return re.sub(rf"\bseed([-=]){seed}(?!\d)", r"seed\1*", value) if isinstance(value, str) else value


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ConfigError: if the file is not there, is no YAML, or holds something else than a mapping or nothing.
    """
    import yaml  # here, because options are also checked where there are no files, with the core alone installed

    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no YAML: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: should hold options as lines `name: value`, and holds {shown(data)}")
    return data


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, where 1e-3 is a number too."""
    import yaml

    from mlo.options.yaml_loader import Loader

    return yaml.load(text, Loader=Loader)


def shown(value: object) -> str:
    """A value as a user would write it, cut to a readable length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
