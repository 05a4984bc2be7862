"""Options as plain data: read from YAML, merged, and named by dotted paths."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlo.errors import ConfigError
from mlo.options.config import KIND, shown


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2, where 1e-3 is a number and `off` is text. A name given twice is an error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # those of YAML 1.1 are not inherited

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; an error if a name is there twice."""
        names = [key.value for key, _ in node.value]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


for tag, pattern in {
    "merge": "<<",
    "null": "null|Null|NULL|~|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^({pattern})$"), None)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """PyYAML takes a leading zero for an octal number."""
    return int(node.value, 0) if node.value[:2] in ("0x", "0o") else int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, or is neither a mapping nor empty.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(data, dict | None):
        raise ConfigError(f"{path}: should have lines like `name: value`, but holds {shown(data)}")
    return data or {}


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
    return {path[0]: nested(path[1:], value)} if path else value


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found


def of_any_seed(value: Any, seed: int) -> Any:
    """A path with * in place of the seed, where it has the form that sweeps give it; anything else unchanged."""
    return re.sub(rf"\bseed([-=]){seed}(?!\d)", r"seed\1*", value) if isinstance(value, str) else value
