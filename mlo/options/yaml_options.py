"""Options as plain data: read from YAML, merged, and named by dotted paths."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlo.errors import ConfigError
from mlo.options.config import KIND, shown

MOST_CHARACTERS = 2**18
MOST_DIGITS = 1000
MOST_VALUES = 10_000  # names included, and what an alias stands for counted each time


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2, where 1e-3 is a number and `off` is text. A name given twice is an error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # those of YAML 1.1 are not inherited
    _composed = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; an error if there are too many."""
        self._composed += 1
        if self._composed > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, _TOO_MANY, parent.start_mark if parent else None)
        return super().compose_node(parent, index)

    def get_single_node(self) -> yaml.Node | None:
        """The root; an error if aliases make too many values of few."""
        root: yaml.Node | None = super().get_single_node()
        if root is not None and _count(root, {}) > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, _TOO_MANY, root.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; an error if a name is there twice, or is no name."""
        names = [key.value if isinstance(key, yaml.ScalarNode) else None for key, _ in node.value]
        if None in names:
            raise yaml.constructor.ConstructorError(None, None, "a name is a list or a mapping", node.start_mark)
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_TOO_MANY = f"there are more than {MOST_VALUES:,} values"


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """How many nodes there are in a node and below it, if each alias is replaced by what it stands for."""
    known = counts.get(id(node), 0)
    if known is None:
        raise yaml.composer.ComposerError(None, None, "a value contains itself", node.start_mark)
    if not known:
        counts[id(node)] = None
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum([_count(part, counts) for part in parts])
        counts[id(node)] = known
    return known


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
    if len(node.value) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(node.value)} digits")
    return int(node.value, 0) if node.value[:2] in ("0x", "0o") else int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: if it is none, or too large for options.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"there are more than {MOST_CHARACTERS:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise yaml.YAMLError("the values are nested too deeply") from error
    # PyYAML's constructors raise them for `!!bool maybe`, `!!timestamp x`, and integers of thousands of digits
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise yaml.YAMLError(f"a value is not what its form says: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, or is neither a mapping nor empty.
    """
    try:
        with path.open(encoding="utf-8") as file:
            data = parse_yaml(file.read(MOST_CHARACTERS + 1))
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
