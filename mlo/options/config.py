"""Typed options: strict models, options chosen by a registered name, and what is wrong with given options."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, core_schema

from mlo.errors import ConfigError
from mlo.options import registry

KIND = "kind"
MOST_FAULTS = 20  # that are listed


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
        found = {}
        for name in registry.entries(self.group):
            with suppress(ConfigError):
                found[name] = registry.load_class(self.group, name, Config)
        return found

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


if TYPE_CHECKING:
    from mlo.hypergradient.estimators.base import Estimator

    EstimatorOption = Annotated[Estimator, Registered(registry.ESTIMATORS)]
else:  # jobs declare this option, and their options are read without loading torch
    EstimatorOption = Annotated[Any, Registered(registry.ESTIMATORS)]


def parse(model: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
    """The model of options as a YAML or JSON file has them: lists for tuples, text for paths."""
    return model.model_validate_json(json.dumps(data, default=str))


def validate(model: type[ConfigT], data: Mapping[str, Any], title: str) -> ConfigT:
    """As :func:`parse`, with an error for people.

    Raises:
        ConfigError: names every invalid option, what was given and what is allowed, under ``title``.
    """
    try:
        return parse(model, data)
    except ValidationError as error:
        faults = explain(error, model, data)
    more = len(faults) - MOST_FAULTS
    listed = [*faults[:MOST_FAULTS], f"and {more} more"] if more > 0 else faults
    raise ConfigError("\n  ".join([f"{title}: {len(faults)} invalid option{'s' * (len(faults) > 1)}", *listed]))


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    """The defaults of a model as plain data, without the options that have no default."""
    return model.model_construct().model_dump(mode="json", warnings=False)


class Option(NamedTuple):
    """An option that takes a value. ``choice``: the (dotted name, kind, class) of the choice that it belongs to."""

    path: str
    field: FieldInfo
    default: Any
    choice: tuple[str, str, type[Config]] | None


def options(
    model: type[BaseModel], kinds: bool = True, held: Any = None, prefix: str = "", choice: Any = None
) -> Iterator[Option]:
    """All options of a model, of the models in it, and (with ``kinds``) of the classes that can be chosen by name.

    The last three arguments are of a model inside another one: the instance that holds its defaults, what the dotted
    names begin with, and its choice.
    """
    held = held if isinstance(held, model) else model.model_construct()
    for name, field in model.model_fields.items():
        path, default, mark = prefix + name, getattr(held, name, PydanticUndefined), registered(field)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and not mark:
            yield from options(field.annotation, kinds, default, f"{path}.", choice)
            continue
        yield Option(path, field, default, choice)
        if mark and kinds and name not in prefix.split("."):  # a class may hold its own kind
            for kind, chosen in mark.kinds().items():
                yield from options(chosen, kinds, default, f"{path}.", (path, kind, chosen))


def registered(field: FieldInfo) -> Registered | None:
    """The mark of an option that is chosen by a registered name."""
    return next((mark for mark in (*field.metadata, *parts(field.annotation)) if isinstance(mark, Registered)), None)


def parts(annotation: Any) -> Iterator[Any]:
    """An annotation and everything in its brackets: members of unions, items of lists, marks, literals."""
    yield annotation
    for argument in get_args(annotation):
        yield from parts(argument)


WORDS = {  # what pydantic says, and what users of YAML understand
    "Input": "it",
    "Tuple": "it",
    "a valid array": "a list",
    "a valid tuple": "a list",
    "an object": "a mapping",
    "a valid boolean": "true or false",
    "a valid string": "text",
}


def explain(error: ValidationError, model: type[Config], data: Mapping[str, Any]) -> list[str]:
    """One line for each invalid option in ``data``: its dotted name, what was given, what is allowed."""
    known = list(options(model))
    names = {name for option in known for name in option.path.split(".")}
    faults: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        unknown = detail["type"] == "extra_forbidden"
        own = names | {detail["loc"][-1]} if unknown else names  # beside these, pydantic puts members of unions there
        path = ".".join(str(part) for part in detail["loc"] if isinstance(part, int) or part in own)
        context, given, allowed = detail.get("ctx", {}), detail["input"], detail["msg"]
        for theirs, ours in WORDS.items():
            allowed = allowed.replace(theirs, ours)
        if unknown:
            faults[path] = _unknown(path, known, data) if len(faults) < MOST_FAULTS else "unknown option"
        elif "error" in context:  # raised by a validator
            faults[path] = str(context["error"])
        elif detail["type"] == "missing":
            faults[path] = "is missing, and has no default"
        elif path in faults:  # another member of a union
            faults[path] += f", or {allowed}"
        else:
            guess = registry.nearest(str(given), re.findall(r"'(\w+)'", context.get("expected", "")))
            faults[path] = f"{shown(given)} was given, but {allowed}" + f"; did you mean {guess}?" * bool(guess)
    # of the members of a union only the one that got furthest
    outer = {path[:end] for path in faults for end, sign in enumerate(path) if sign == "."}
    found = {path: text for path, text in faults.items() if path not in outer}
    return [f"{path}: {message}" if path else message for path, message in found.items()]


def _unknown(path: str, known: Sequence[Option], data: Mapping[str, Any]) -> str:
    """Which kinds have the option, or which option of what ``data`` choose was meant, or which there are."""
    section, _, name = path.rpartition(".")
    kinds = dict.fromkeys(option.choice[1] for option in known if option.path == path and option.choice)
    if kinds:
        return f"is an option of {', '.join(kinds)}, not of the chosen {section}"
    usual = {option.path: option.default for option in known}
    chosen = [option for option in known if option.choice is None or _is_chosen(*option.choice, data, usual)]
    names = [option.path.split(".") for option in chosen]
    paths = dict.fromkeys(".".join(words[: n + 1]) for words in names for n in range(len(words)))  # sections too
    last = {other: other.rpartition(".")[2] for other in paths}
    here = [other for other in paths if other.rpartition(".")[0] == section]
    nearest = registry.nearest(name, last.values())
    meant = [other for other in paths if last[other] == nearest]
    meant = [other for other in meant if other in here] or meant
    if meant:
        return f"unknown option; did you mean {' or '.join(meant)}?"
    return f"unknown option; there are: {', '.join(last[other] for other in here) or 'none'}"


def _is_chosen(path: str, kind: str, model: type, data: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Whether ``data``, or the ``usual`` value, chooses a kind."""
    value: Any = data
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    value = usual.get(path) if value is None else value
    return kind == (value.get(KIND) if isinstance(value, Mapping) else value) or type(value) is model


def shown(value: object) -> str:
    """A value as a user would write it, cut to a readable length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
