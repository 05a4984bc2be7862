"""Typed options: strict models, options chosen by a registered name, and error messages for people."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from mlo.errors import ConfigError
from mlo.options import registry
from mlo.options.yaml_options import KIND, shown


class Config(BaseModel):
    """A frozen set of options. Unknown options and values of another type are errors.

    An option that is a tuple also takes a list, as YAML files have it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**_tuples(options))
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: {'; '.join(explain(error, type(self), options))}") from error

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # lets files and defaults be read without it


def _tuples(value: Any) -> Any:
    """The value with a tuple for each list in it."""
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class Registered:
    """Marks an option whose value is one of the Config classes registered in an entry-point group.

    An option ``estimator: Annotated[Estimator, Registered(ESTIMATORS)] = Darts()`` takes a name, a mapping
    ``{"kind": name, **options}``, or an instance. Its value is always an instance.
    """

    group: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Let pydantic validate with :meth:`build` and serialize with :meth:`dump`."""
        return core_schema.no_info_plain_validator_function(
            self.build, serialization=core_schema.plain_serializer_function_ser_schema(self.dump)
        )

    def build(self, value: object) -> Config:
        """The instance for a name, a mapping or an instance."""
        if isinstance(value, Config):
            return value
        options = {KIND: value} if isinstance(value, str) else value
        if not isinstance(options, Mapping) or not isinstance(options.get(KIND), str):
            names = " | ".join(registry.entries(self.group))
            raise ValueError(f"{shown(value)} was given, but it should be a name ({names}) or {{{KIND}: NAME, ...}}")
        try:
            model = registry.load_class(self.group, options[KIND], Config)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return parse(model, {name: given for name, given in options.items() if name != KIND})

    def kinds(self) -> dict[str, type[Config]]:
        """All classes that can be chosen, by name. Broken packages are left out."""
        return _kinds(self.group, tuple(sys.path))

    def names(self, model: type) -> list[str]:
        """The names under which a class is registered."""
        return [name for name, kind in self.kinds().items() if kind is model]

    def dump(self, value: object) -> object:
        """The mapping from which :meth:`build` makes the instance again."""
        if not isinstance(value, Config):
            return value
        names = self.names(type(value))
        if not names:
            raise ValueError(f"{type(value).__name__} is not registered in {self.group}, so a file cannot name it")
        return {KIND: names[0], **value.model_dump(mode="json")}


@cache  # finding the entry points of one group takes milliseconds
def _kinds(group: str, paths: tuple[str, ...]) -> dict[str, type[Config]]:
    found = {}
    for name in registry.entries(group):
        with suppress(ConfigError):
            found[name] = registry.load_class(group, name, Config)
    return found


if TYPE_CHECKING:
    from mlo.hypergradient.estimators.base import Estimator

    EstimatorOption = Annotated[Estimator, Registered(registry.ESTIMATORS)]
else:  # jobs declare this option, and their options are read without loading torch
    EstimatorOption = Annotated[Any, Registered(registry.ESTIMATORS)]


def parse(model: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
    """The model of options as a YAML or JSON file has them: lists for tuples, text for paths."""
    return model.model_validate_json(json.dumps(data, default=str))


def validate(model: type[ConfigT], data: Mapping[str, Any], title: str) -> ConfigT:
    """The model of ``data``.

    Raises:
        ConfigError: names every invalid option, what was given and what is allowed, under ``title``.
    """
    try:
        return parse(model, data)
    except ValidationError as error:
        faults = explain(error, model, data)
    raise ConfigError("\n  ".join([f"{title}: {len(faults)} invalid option{'s' * (len(faults) > 1)}", *faults]))


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    """The defaults of a model as plain data, without the options that have no default."""
    return model.model_construct().model_dump(mode="json", warnings=False)


class Option(NamedTuple):
    """One option of a model or of a model below it.

    Attributes:
        path: its dotted name.
        field: its type and description.
        value: its value in the options that were walked through; its default where they have none.
        nested: whether other options stand below it.
        choice: (path, name) of the choice that it belongs to; None where nothing had to be chosen.
    """

    path: str
    field: FieldInfo
    value: Any
    nested: bool
    choice: tuple[str, str] | None


def options(
    model: type[BaseModel],
    values: Any = None,
    kinds: Literal["all", "chosen", "none"] = "all",
    prefix: str = "",
    choice: tuple[str, str] | None = None,
) -> Iterator[Option]:
    """Every option of a model, those of nested models behind the option that holds them.

    Args:
        model: whose options.
        values: a mapping or an instance with values of the options; None: the defaults.
        kinds: whether to give the options of all classes that can be chosen by name, of the chosen one, or of none,
            which needs none of their packages.
        prefix: what their dotted names begin with.
        choice: see :class:`Option`.
    """
    values = model.model_construct() if values is None else values
    for name, field in model.model_fields.items():
        path = prefix + name
        value = values.get(name, field.default) if isinstance(values, Mapping) else getattr(values, name, field.default)
        mark, below = registered(field), _nested_model(field)
        yield Option(path, field, value, bool(mark or below), choice)
        if below:
            held = value if isinstance(value, Mapping | BaseModel) else None
            yield from options(below, held, kinds, f"{path}.", choice)
        if mark is None or kinds == "none" or path.split(".").count(name) > 1:  # a class that holds its own kind
            continue
        for kind, model_of_kind in mark.kinds().items():
            here = kind == (value.get(KIND) if isinstance(value, Mapping) else value) or type(value) is model_of_kind
            if here or kinds == "all":
                held = value if here and not isinstance(value, str) else None
                yield from options(model_of_kind, held, kinds, f"{path}.", (path, kind))


def registered(field: FieldInfo) -> Registered | None:
    """The mark of an option that is chosen by a registered name."""
    return next((mark for mark in (*field.metadata, *parts(field.annotation)) if isinstance(mark, Registered)), None)


def _nested_model(field: FieldInfo) -> type[BaseModel] | None:
    inside = list(parts(field.annotation))
    if registered(field) or any(get_origin(part) in (tuple, list, dict) for part in inside):
        return None
    return next((part for part in inside if isinstance(part, type) and issubclass(part, BaseModel)), None)


def parts(annotation: Any) -> Iterator[Any]:
    """An annotation and everything in its brackets: members of unions, items of lists, marks, literals."""
    yield annotation
    for argument in get_args(annotation):
        yield from parts(argument)


BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "of length >=", "max_length": "of length <="}
WORDS: dict[Any, str] = {NoneType: "null", bool: "true | false", str: "text", float: "number", ...: "..."}


def type_text(field: FieldInfo) -> str:
    """An option's type as a user would write it, with its bounds: `int >= 1`, `true | false`, `a | b`."""
    mark, below = registered(field), _nested_model(field)
    if below:
        return f"a mapping with {', '.join(below.model_fields)}"
    text = " | ".join(registry.entries(mark.group)) if mark else _annotation_text(field.annotation)
    bounds = " and ".join(
        f"{sign} {getattr(m, key)}" for m in field.metadata for key, sign in BOUNDS.items() if hasattr(m, key)
    )
    before, null, after = text.partition(" | null")
    return f"{before} {bounds}".rstrip() + null + after


def _annotation_text(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotation_text(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    texts = [_annotation_text(part) for part in inner]
    if origin in (Union, UnionType):
        return " | ".join(texts)
    if origin in (tuple, list):
        return f"[{', '.join(texts)}{', ...' * (origin is list)}]"
    if origin is dict:
        return f"{{{': '.join(texts)}}}"
    return WORDS.get(annotation) or getattr(annotation, "__name__", str(annotation)).lower()


def explain(error: ValidationError, model: type[Config], data: Mapping[str, Any]) -> list[str]:
    """One line for each invalid option: its dotted name, what was given, what is allowed."""
    known = {option.path: option for option in options(model, data, kinds="chosen")}
    faults: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path = last = ""
        for part in detail["loc"]:  # between the names of options pydantic puts members of unions and places in lists
            last = f"{path}.{part}".lstrip(".")
            path = last if last in known else path
        if detail["type"] == "extra_forbidden":
            faults[last] = _unknown(last, detail["input"], known, model)
        elif "error" in detail.get("ctx", {}):  # raised by a validator
            faults[path] = str(detail["ctx"]["error"])
        elif detail["type"] == "missing" and path == last:
            faults[path] = "has no default, so it must be given"
        else:
            faults[path] = _invalid(known[path]) if path else detail["msg"]
    return [f"{path}: {message}" if path else message for path, message in faults.items()]


def _invalid(option: Option) -> str:
    choices = [part for part in parts(option.field.annotation) if isinstance(part, str)]
    given = [option.value] if isinstance(option.value, str) else option.value if isinstance(option.value, list) else []
    guesses = [registry.nearest(str(item), choices) for item in given if item not in choices]
    hint = f"; did you mean {guesses[0]}?" if guesses and guesses[0] else ""
    return f"{shown(option.value)} was given, but it should be {type_text(option.field)}{hint}"


def _unknown(path: str, value: object, known: Mapping[str, Option], model: type[Config]) -> str:
    """Which classes have the option that the chosen one lacks, or which option was meant, or which there are."""
    parent, _, name = path.rpartition(".")
    split = [(option, *option.path.rpartition(".")[::2]) for option in known.values()]
    siblings = ", ".join(own for _, above, own in split if above == parent) or "none"
    others = [option.choice[1] for option in options(model) if option.path == path and option.choice]
    if others:
        return f"is an option of {', '.join(others)}; those of {known[parent].value[KIND]} are: {siblings}"
    possible = [part for part in split if part[0].nested or not isinstance(value, Mapping | BaseModel)]
    nearest = registry.nearest(name, [own for _, _, own in possible])
    meant = [(option.path, above) for option, above, own in possible if own == nearest]
    meant = [part for part in meant if part[1] == parent] or meant
    hint = f"did you mean {' or '.join(path for path, _ in meant)}?" if meant else f"the options here are: {siblings}"
    return f"unknown option; {hint}"
