"""Options as plain data: strict types, registered choices, layers, and all errors reported at once."""

import math
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from mlo.errors import ConfigError
from mlo.options.config import Config, Registered, defaults, validate
from mlo.options.yaml_options import merge, parse_yaml, read_yaml

FRUITS = """
from mlo.options.config import Config
from pydantic import Field

class Apple(Config):
    "A pome."

class Cherry(Config):
    stones: int = Field(1, gt=0)
    sizes: tuple[int, float] = (1, 2.0)

class Plum(Config):
    stones: int = 1
    stalk: int = 0

class Stranger:
    "No Config."
"""


class Basket(Config):
    weight: float = 1.0


class Shop(Config):
    seed: int = 0
    open: bool = False
    label: int | str | None = None
    mood: Literal["good", "bad"] = "good"
    folder: Path = Path("here")
    span: tuple[int, int] = (1, 2)
    basket: Basket = Basket()
    baskets: tuple[Basket, ...] = ()
    rate: float = Field(0.5, gt=0)
    fruit: Annotated[Config, Registered("test.fruits")] | None = None


class Street(Config):
    number: int = 0
    shop: Shop = Shop()
    left: Basket = Basket()


class Market(Config):
    stone: int = 0
    stones: int = 0
    fruit: Annotated[Config, Registered("test.fruits")] = Basket()


class Strict(Config):
    must: int


class Bowl(Config):
    fruits: tuple[Literal["apple", "cherry"], ...] = Field(("apple",), min_length=1)
    sizes: int | tuple[int, ...] = 3
    rows: tuple[tuple[int, ...], ...] = ()


@pytest.fixture(autouse=True)
def fruits(register):
    names = {"apple": "fruits:Apple", "cherry": "fruits:Cherry", "plum": "fruits:Plum", "stranger": "fruits:Stranger"}
    register("fruits", FRUITS, {"test.fruits": names})


def message(model, data):
    with pytest.raises(ConfigError) as error:
        validate(model, data, "shop")
    return str(error.value)


def test_what_a_file_can_say_becomes_what_the_option_is():
    shop = validate(Shop, {"folder": "a/b", "span": [3, 4], "rate": 2, "baskets": [{"weight": math.inf}]}, "shop")
    assert (shop.folder, shop.span, shop.rate, shop.baskets[0].weight) == (Path("a/b"), (3, 4), 2.0, math.inf)


def test_the_options_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Shop().seed = 3


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"seed": "x"}, '  seed: "x" was given, but it should be a valid integer'),
        ({"seed": 1.5}, "  seed: 1.5 was given, but it should be a valid integer"),
        ({"seed": True}, "  seed: true was given, but it should be a valid integer"),
        ({"open": 1}, "  open: 1 was given, but it should be true or false"),
        ({"mood": "so"}, "  mood: \"so\" was given, but it should be 'good' or 'bad'"),
        ({"mood": "god"}, "  mood: \"god\" was given, but it should be 'good' or 'bad'; did you mean good?"),
        ({"span": "3"}, '  span: "3" was given, but it should be a list'),
        ({"baskets": "a,b"}, '  baskets: "a,b" was given, but it should be a list'),
        ({"span": None}, "  span: null was given, but it should be a list"),
        ({"span": [3]}, "  span.1: is missing, and has no default"),
        (
            {"span": [3, 4, 5]},
            "  span: [3, 4, 5] was given, but it should have at most 2 items after validation, not 3",
        ),
        ({"rate": 0}, "  rate: 0 was given, but it should be greater than 0"),
        ({"sed": 1}, "  sed: unknown option; did you mean seed?"),
        ({"basket": {"wait": 1, "weihgt": 1}}, "  basket.weihgt: unknown option; did you mean basket.weight?"),
        ({"basket": {"zzz": 1}}, "  basket.zzz: unknown option; there are: weight"),
        ({"basket": 3}, "  basket: 3 was given, but it should be a mapping"),
        ({"baskets": [{}, {"weight": "x"}]}, '  baskets.1.weight: "x" was given, but it should be a valid number'),
        ({"label": 1.5}, "  label: 1.5 was given, but it should be a valid integer, or it should be text"),
        ({"fruit": "chery"}, "  fruit: 'chery' is not known among test.fruits; did you mean cherry? there are: apple"),
        (
            {"fruit": 3},
            "  fruit: 3 was given, but it should be a name (apple | cherry | plum | stranger) or {kind: NAME, ...}",
        ),
        (
            {"fruit": {"stones": 3}},
            '  fruit: {"stones": 3} was given, but it should be a name (apple | cherry | plum | stranger)',
        ),
        ({"fruit": "stranger"}, "register a class derived from mlo.options.config.Config"),
        ({"fruit": {"kind": "cherry", "stone": 3}}, "  fruit.stone: unknown option; did you mean fruit.stones?"),
        ({"fruit": {"kind": "cherry", "stones": 0}}, "  fruit.stones: 0 was given, but it should be greater than 0"),
    ],
)
def test_a_fault_names_the_option_and_the_remedy(given, line):
    assert line in message(Shop, given)


@pytest.mark.parametrize(
    ("fruit", "line"),
    [
        ({"kind": "apple", "stones": 3}, "fruit.stones: is an option of cherry, plum, not of the chosen fruit"),
        ({"kind": "cherry", "stalk": 3}, "fruit.stalk: is an option of plum, not of the chosen fruit"),
        ({"kind": "plum", "worm": 3}, "fruit.worm: unknown option; there are: stones, stalk"),
        ({"kind": "cherry", "stlak": 3}, "fruit.stlak: unknown option; there are: stones, sizes"),
        ({"kind": "apple", "stoness": 3}, "fruit.stoness: unknown option; there are: none"),
        ({"kind": "plum", "seed": 3}, "fruit.seed: unknown option; did you mean seed?"),
    ],
)
def test_an_option_of_another_kind_is_reported_with_the_kinds(fruit, line):
    assert message(Shop, {"fruit": fruit}) == f"shop: 1 invalid option\n  {line}"
    with pytest.raises(ConfigError) as error:
        Shop(fruit=fruit)
    assert str(error.value) == f"Shop: {line}"


def test_what_other_kinds_have_is_not_taken_for_an_option_elsewhere():
    line = "fruit.stones: is an option of cherry, plum, not of the chosen fruit"
    assert message(Market, {"fruit": {"kind": "apple", "stones": 3}}) == f"shop: 1 invalid option\n  {line}"


def test_an_option_is_found_below_an_instance():
    plum = validate(Shop, {"fruit": "plum"}, "shop").fruit
    with pytest.raises(ConfigError) as error:
        Shop(fruit=plum, stalc=1)
    assert str(error.value) == "Shop: stalc: unknown option; did you mean fruit.stalk?"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"moood": "bad"}, "shop.mood"),
        ({"shop": {"fruit": "plum"}, "stalk": 1}, "shop.fruit.stalk"),
        ({"wieght": 1}, "shop.basket.weight or left.weight"),
        ({"shop": {"number": 1}}, "number"),
        ({"shop": {"wieght": 1}}, "shop.basket.weight or left.weight"),
        ({"left": {"wieght": 1}}, "left.weight"),
        ({"basket": {"weight": 1}}, "shop.basket"),
        ({"shoop": {"number": 1}}, "shop"),
        ({"qqq": 1}, None),
    ],
)
def test_an_option_of_another_section_is_found(given, meant):
    remedy = f"did you mean {meant}?" if meant else "there are: number, shop, left"
    assert message(Street, given).endswith(f"unknown option; {remedy}")


def test_a_list_whose_items_are_at_fault_is_not_called_too_short_too():
    assert message(Bowl, {"fruits": ["appel"]}).startswith("shop: 1 invalid option\n  fruits.0: ")
    assert "fruits: [] was given, but it should have at least 1 item after validation, not 0" in message(
        Bowl, {"fruits": []}
    )


def test_a_list_in_python_is_as_good_as_a_tuple():
    bowl = Bowl(fruits=["apple", "cherry"], sizes=[3, 4], rows=[[1], (2, 3)])
    assert (bowl.fruits, bowl.sizes, bowl.rows) == (("apple", "cherry"), (3, 4), ((1,), (2, 3)))
    assert Shop(span=[3, 4], baskets=[{"weight": 2}]).baskets == (Basket(weight=2.0),)
    assert bowl == Bowl(fruits=("apple", "cherry"), sizes=(3, 4), rows=((1,), (2, 3)))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"fruits": "apple"}, 'Bowl: fruits: "apple" was given, but it should be a list'),
        ({"fruits": {"apple"}}, "Bowl: fruits: \"{'apple'}\" was given, but it should be a list"),
        ({"fruits": ["appel"]}, "Bowl: fruits.0: \"appel\" was given, but it should be 'apple' or 'cherry'"),
        ({"sizes": [3, 4.5]}, "Bowl: sizes.1: 4.5 was given, but it should be a valid integer"),
        ({"sizes": "x"}, 'Bowl: sizes: "x" was given, but it should be a valid integer, or it should be a list'),
    ],
)
def test_what_is_wrong_with_a_list_in_python_is_reported_for_its_items(given, line):
    with pytest.raises(ConfigError) as error:
        Bowl(**given)
    assert str(error.value).partition(";")[0] == line


def test_all_errors_are_reported_at_once():
    text = message(
        Shop, {"sed": 1, "open": "x", "basket": {"wait": 1}, "fruit": {"kind": "cherry", "stones": 0, "q": 1}}
    )
    assert text.startswith("shop: 5 invalid options\n")
    assert text.count("\n") == 5


def test_an_option_without_default_must_be_given():
    assert message(Strict, {}) == "shop: 1 invalid option\n  must: is missing, and has no default"
    assert defaults(Strict) == {}


@pytest.mark.parametrize("value", ["cherry", {"kind": "cherry"}])
def test_a_bare_name_is_a_kind_without_options(value):
    fruit = validate(Shop, {"fruit": value}, "shop").fruit
    assert (type(fruit).__name__, fruit.stones) == ("Cherry", 1)


def test_what_is_written_is_read_again():
    shop = validate(Shop, {"fruit": {"kind": "cherry", "stones": 3, "sizes": [1, 0.5]}, "rate": 1e-5}, "shop")
    text = yaml.safe_dump(shop.model_dump(mode="json"))
    assert validate(Shop, parse_yaml(text), "shop") == shop


def test_an_instance_that_no_name_stands_for_cannot_be_written():
    with pytest.raises(ValueError, match="Basket is not registered in test"):
        Shop(fruit=Basket()).model_dump(mode="json")


@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 4}}, {"a": 1, "b": {"c": 2, "d": 4}}),
        ({"f": "cherry"}, {"f": {"stones": 3}}, {"f": {"kind": "cherry", "stones": 3}}),
        ({"f": {"kind": "cherry", "stones": 3}}, {"f": "cherry"}, {"f": {"kind": "cherry", "stones": 3}}),
        ({"f": {"kind": "cherry", "stones": 3}}, {"f": "apple"}, {"f": {"kind": "apple"}}),
        ({"f": {"kind": "cherry", "stones": 3}}, {"f": {"kind": "apple"}}, {"f": {"kind": "apple"}}),
        ({"f": {"kind": "cherry", "stones": 3}}, {"f": None}, {"f": None}),
        ({"f": [1, 2]}, {"f": [3]}, {"f": [3]}),
    ],
)
def test_layers(base, over, merged):
    assert merge(base, over) == merged


def test_numbers_with_an_exponent_are_numbers():
    given = parse_yaml("{a: 1e-3, b: -2E4, c: 1.5e+3, d: e3, e: '1e3', f: 7}")
    assert given == {"a": 1e-3, "b": -2e4, "c": 1500.0, "d": "e3", "e": "1e3", "f": 7}


def test_scalars_are_those_of_yaml_1_2():
    given = parse_yaml("[on, off, yes, true, FALSE, 2024-01-01, 1:30, 010, .5, -.INF, Null, ~, -3, 0x1F, 0o17, 2e3]")
    text = ["on", "off", "yes", True, False, "2024-01-01", "1:30"]
    assert given == [*text, 10, 0.5, -math.inf, None, None, -3, 31, 15, 2000.0]
    assert type(given[7]) is int
    assert math.isnan(parse_yaml(".NaN"))
    assert parse_yaml("base: &b {a: 1}\nother: {<<: *b, c:}")["other"] == {"a": 1, "c": None}


def test_a_name_given_twice_is_refused():
    with pytest.raises(yaml.YAMLError, match="'steps' is given twice"):
        parse_yaml("steps: 2\nsearch: {cells: 3}\nsteps: 3")


@pytest.mark.parametrize("content", ["", "# rate: 0.5\n"])
def test_an_empty_file_has_no_options(tmp_path, content):
    path = tmp_path / "options.yaml"
    path.write_text(content)
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("a: [1", "is not valid YAML"), ("- 1\n", r"should have lines .* but holds \[1\]")],
)
def test_a_file_that_is_not_what_it_should_be(tmp_path, content, message):
    path = tmp_path / "options.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def bomb(first: str, then: str) -> str:
    """Eight levels of nine aliases each: 43 million values in a few lines."""
    levels = zip("abcdefgh", "bcdefghi", strict=True)
    return first + "".join(f"{name}: &{name} {then.format(', '.join(9 * [f'*{last}']))}\n" for last, name in levels)


LARGE = "there are more than"
NO_VALUE = "a value is not what its form says"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb("a: &a [x]\n", "[{}]"), LARGE),
        (bomb("a: &a {{x: 1}}\n", "{{<<: [{}]}}"), LARGE),
        (bomb("a: &a [x]\n", "{{l: [{}]}}"), LARGE),
        ("a: &a [*a]", "a value contains itself"),
        ("a: &a {b: [*a]}", "a value contains itself"),
        ("".join(f"k{i}: 1\n" for i in range(30_000)), LARGE),
        ("".join(f"k{i}: 1\n" for i in range(10_000)), LARGE),
        ("".join(f"k{i}: 1\n" for i in range(4_900)) + "k7: 1", "'k7' is given twice"),
        ("a: " + "x" * 10**6, LARGE),
        ("[" * 20_000, "nested too deeply"),
        ("{a: " * 3_000, "nested too deeply"),
        ("a: " + "1" * 5000, f"{NO_VALUE}: an integer of 5000 digits"),
        ("a: 0x" + "f" * 5000, NO_VALUE),
        ("a: !!int 0b_", NO_VALUE),
        ("a: !!bool maybe", NO_VALUE),
        ("a: !!timestamp 2020-99-99", NO_VALUE),
        ("a: !!timestamp x", NO_VALUE),
        ("? [a]\n: 1", "a name is a list or a mapping"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: \0", "special characters are not allowed"),
    ],
    ids=range(20),
)
def test_text_that_is_no_options_is_refused_quickly(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=rf"c\.yaml: is not valid YAML: (?s:.*){message}"):
        read_yaml(tmp_path / "c.yaml")
    assert time.process_time() - start < 2  # most take some hundredths


def test_endless_files_are_refused():
    with pytest.raises(ConfigError, match=LARGE):
        read_yaml(Path("/dev/zero"))


def test_thousands_of_unknown_options_are_refused_quickly():
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"shop: 4000 invalid options(?s:.*)\n  and 3980 more$"):
        validate(Shop, {f"o{i}": 1 for i in range(4000)}, "shop")
    assert time.process_time() - start < 2


def test_an_alias_may_be_used_many_times():
    assert len(parse_yaml("a: &a [1, 2, 3]\nb: [" + "*a, " * 2000 + "]")["b"]) == 2000
