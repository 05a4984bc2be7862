"""Typed options: strict models, options chosen by a registered name, faults told to people."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, core_schema

from mlo.errors import ConfigError
from mlo.options import registry
from mlo.options.yaml_options import KIND, shown


def _taking_lists(schema: Any) -> Any:
    """A schema whose tuples, at any depth, take other sequences as well."""
    if isinstance(schema, list):
        return [_taking_lists(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _taking_lists(part) for key, part in schema.items()}
    if schema.get("type") != "tuple":
        return schema
    return core_schema.no_info_before_validator_function(_as_tuple, schema)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


class Config(BaseModel):
    """A frozen set of options that refuses what it does not know and what has another type.

    An option that is a tuple takes a list too, as a person writes it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            faults = "; ".join(explain(error, type(self), options))
            raise ConfigError(f"{type(self).__name__}: {faults}") from error

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # files and defaults are read without it

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Pydantic's own, with tuples that take lists."""
        made: core_schema.CoreSchema = _taking_lists(handler(source))
        return made


ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class Registered:
    """Marks an option whose value is one of the Config classes registered in an entry-point group.

    An option ``estimator: Annotated[Estimator, Registered(ESTIMATORS)] = Darts()`` takes a bare name, a mapping
    ``{"kind": name, **its options}``, or an instance, and its value is always an instance.
    """

    group: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Let pydantic validate by :meth:`build` and write by :meth:`dump`."""
        return core_schema.no_info_plain_validator_function(
            self.build, serialization=core_schema.plain_serializer_function_ser_schema(self.dump)
        )

    def build(self, value: object) -> Config:
        """The instance that a name, a mapping or an instance stands for."""
        if isinstance(value, Config):
            return value
        options = {KIND: value} if isinstance(value, str) else value
        names = " | ".join(registry.entries(self.group))
        if not isinstance(options, Mapping):
            raise ValueError(f"it should be a name ({names}) or a mapping with its {KIND} and options")
        if not isinstance(options.get(KIND), str):
            raise ValueError(f"the mapping should say its {KIND}: {names}")
        return parse(self.model(options), {key: given for key, given in options.items() if key != KIND})

    def model(self, value: object) -> type[Config]:
        """The class that a name, or the kind in a mapping, stands for; ValueError if there is none."""
        name = value if isinstance(value, str) else value[KIND] if isinstance(value, Mapping) else ""
        try:
            return registry.load_class(self.group, name, Config)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def kinds(self) -> dict[str, type[Config]]:
        """All that can be chosen, by name; a broken package is no matter of this option's."""
        found = {}
        for name in registry.entries(self.group):
            with suppress(ValueError):
                found[name] = self.model(name)
        return found

    def names(self, model: type) -> list[str]:
        """The names that a class is registered under."""
        return [name for name, kind in self.kinds().items() if kind is model]

    def dump(self, value: object) -> object:
        """The mapping that :meth:`build` makes the instance of again."""
        if not isinstance(value, Config):
            return value
        names = self.names(type(value))
        if not names:
            raise ValueError(f"{type(value).__name__} is not registered in {self.group}, so a file cannot name it")
        return {KIND: names[0], **value.model_dump(mode="json")}


if TYPE_CHECKING:
    from mlo.hypergradient.estimators.base import Estimator

    EstimatorOption = Annotated[Estimator, Registered(registry.ESTIMATORS)]
else:  # jobs declare it, and their options are read without loading torch
    EstimatorOption = Annotated[Any, Registered(registry.ESTIMATORS)]


def parse(model: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
    """The model of options as a YAML or JSON file gives them: lists may stand for tuples, strings for paths."""
    return model.model_validate_json(json.dumps(data, default=str))


def validate(model: type[ConfigT], data: Mapping[str, Any], title: str) -> ConfigT:
    """The model of ``data``; ``title`` says whose options they are.

    Raises:
        ConfigError: with every fault, its place, what was given and what is allowed.
    """
    try:
        return parse(model, data)
    except ValidationError as error:
        faults = explain(error, model, data)
    raise ConfigError("\n  ".join([f"{title}: {len(faults)} option{'s' * (len(faults) > 1)} to mend", *faults]))


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    """The defaults of a model as plain data; options without one are left out."""
    return model.model_construct().model_dump(mode="json", warnings=False)


def explain(error: ValidationError, model: type[Config], data: Any) -> list[str]:
    """One line for each option at fault: its dotted path, what was given, what is allowed."""
    faults: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        place = _place(detail, model, data)
        unknown = detail["type"] == "extra_forbidden"
        fault = _unknown(place, detail["input"], model, data) if unknown else _remedy(detail, place.below)
        faults.setdefault(".".join(place.path), []).append(fault)
    # of a list whose items are at fault pydantic says more: that it is no number, that its valid items are too few
    return [
        ": ".join(filter(None, [path, _either(told)]))
        for path, told in faults.items()
        if not any(other.startswith(f"{path}.") for other in faults)
    ]


def _either(told: Sequence[str]) -> str:
    """What each branch of a union has to say of one option, with what was given once."""
    first, *others = dict.fromkeys(told)
    return " or ".join([first, *(other.rpartition(GIVEN_NOT)[2] for other in others)])


class _Place(NamedTuple):
    """Where an error is.

    Attributes:
        path: as the user wrote it.
        owner: the model whose option it is.
        mark: what the owner was chosen by, where it was.
        below: the model whose options stand below it.
    """

    path: tuple[str, ...]
    owner: type[BaseModel] | None
    mark: Registered | None
    below: type[BaseModel] | None


def _place(detail: ErrorDetails, model: type[Config], data: Any) -> _Place:
    """The place of an error, to whose path pydantic adds the branch of a union."""
    marks = (Registered(group) for group in (registry.ESTIMATORS, registry.PRODUCTS))
    mark = next((mark for mark in marks if mark.names(model)), None)
    place = _Place((), None, None, model)
    for part in detail["loc"]:
        held = isinstance(data, Mapping) and part in data
        held = held or (isinstance(data, Sequence) and isinstance(part, int) and part < len(data))
        if not held and detail["type"] != "missing":
            continue
        data = data[part] if held else None
        field = place.below.model_fields.get(str(part)) if place.below else None
        below = option_model(field, data) if field else place.below
        place = _Place((*place.path, str(part)), place.below, mark, below)
        mark = registered(field) if field else mark
    return place


def _unknown(place: _Place, value: object, model: type[Config], data: Any) -> str:
    """What is said of an option that is none: which kinds have it, which one was meant, or which there are."""
    *above, name = place.path
    own, kind = list(place.owner.model_fields) if place.owner else [], ""
    fault, having = "unknown option", []
    options = [path for path, section in _paths(model, data) if section or not isinstance(value, Mapping | BaseModel)]
    if place.mark and place.owner:
        kind = place.mark.names(place.owner)[0]
        having = [other for other, one in place.mark.kinds().items() if name in one.model_fields]
    if having:  # what else is called like it is of no interest, unless it belongs to this very kind
        fault = f"{kind} has no such option, but {_listed(having)} {'have' if having[1:] else 'has'} it"
        options = [path for path in options if path[-1] == name and path[: len(above)] == tuple(above)]
    nearest = registry.nearest(name, [path[-1] for path in options])
    meant = [path for path in options if path[-1] == nearest]
    meant = [path for path in meant if path[:-1] == tuple(above)] or meant
    if meant:
        return f"{fault}; did you mean {' or '.join('.'.join(path) for path in meant)}?"
    return f"{fault}; the options {f'of {kind}' if kind else 'here'} are: {', '.join(own) or 'none'}"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _paths(model: type[BaseModel], data: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The path of each option of a model and of the kinds chosen in ``data``, and whether others can stand below it."""
    for name, field in model.model_fields.items():
        value = data.get(name, field.default) if isinstance(data, Mapping) else field.default
        listed = any(get_origin(part) in (tuple, list, dict) for part in parts(field.annotation))
        below = None if listed else option_model(field, value)
        yield (*above, name), bool(below or registered(field))
        if below:
            yield from _paths(below, value, (*above, name))


GIVEN_NOT = " was given, but it should be "
WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "is_instance_of": "a {class}",
    "dict_type": "a mapping of names to values",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
}


def _remedy(detail: ErrorDetails, below: type[BaseModel] | None) -> str:
    """What is wrong with the value of an option, below which a model's may stand, and what to write instead."""
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "missing":
        listed = isinstance(detail["loc"][-1], int)
        return "is missing, for the list is too short" if listed else "has no default, so it must be given"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("tuple_type", "list_type"):
        one = isinstance(value, str | int | float) and not isinstance(value, bool)
        example = shown(value).strip('"') if one else "a, b"
        return f"{shown(value)}{GIVEN_NOT}a list: [{example}]"
    if kind in ("model_type", "model_attributes_type") and below:
        return f"{shown(value)}{GIVEN_NOT}a mapping of its options: {', '.join(below.model_fields)}"
    if kind in WANTED:
        return f"{shown(value)}{GIVEN_NOT}{WANTED[kind].format(**context)}"
    said = f"{shown(value)} was given, but {re.sub('^[A-Z][a-z]+ ', 'it ', detail['msg'])}"
    if kind == "literal_error":
        guess = registry.nearest(str(value), re.findall("'([^']*)'", context["expected"]))
        said += f"; did you mean {guess}?" if guess else ""
    return said


def registered(field: FieldInfo) -> Registered | None:
    """The mark of an option that is chosen by a registered name."""
    marks = [mark for mark in (*field.metadata, *parts(field.annotation)) if isinstance(mark, Registered)]
    return marks[0] if marks else None


def option_model(field: FieldInfo, value: Any) -> type[BaseModel] | None:
    """The model whose options stand below an option that has this value."""
    mark = registered(field)
    if isinstance(value, BaseModel):
        return type(value)
    if mark:
        try:
            return mark.model(value)
        except (ValueError, KeyError):
            return None
    return next((t for t in parts(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)


def parts(annotation: Any) -> Iterator[Any]:
    """An annotation and all that its brackets hold: the branches of a union, the items of a list, the marks."""
    yield annotation
    for argument in get_args(annotation):
        yield from parts(argument)
