"""Names found through entry points, and what is said of those that are not."""

import re
import sys
from pathlib import Path

import pytest

from mlo.errors import ConfigError
from mlo.options import registry

GROUP = "mlo.problems"


def test_a_registered_object_is_found_by_its_name(register):
    register("apples", "class Apple: pass", {GROUP: {"apple": "apples:Apple"}})
    assert "apple" in registry.entries(GROUP)
    assert registry.load(GROUP, "apple").__name__ == "Apple"


def test_entries_come_in_order_of_names_and_import_nothing(register):
    register("raises", "raise RuntimeError('imported')", {"some.group": {"b": "raises:B", "a": "raises:A"}})
    assert list(registry.entries("some.group")) == ["a", "b"]


def test_an_unknown_name_is_answered_with_the_nearest_and_all(register):
    register("pears", "Pear = Plum = int", {"some.group": {"pear": "pears:Pear", "plum": "pears:Plum"}})
    with pytest.raises(ConfigError, match=r"'paer' is not known among some.group; did you mean pear\? .*: pear, plum"):
        registry.load("some.group", "paer")


@pytest.mark.parametrize(
    ("group", "name", "message"),
    [
        (registry.ESTIMATORS, "central", "among mlo.products (--hypergradient.product central); there are: cg,"),
        (registry.PROBLEMS, "table2", "among mlo.experiments (mlo reproduce table2); there are: evaluate, lbt"),
    ],
)
def test_a_name_of_another_group_is_reported_with_the_way_to_write_it(group, name, message):
    with pytest.raises(ConfigError, match=re.escape(f"{name!r} is not known among {group}, but {message}")):
        registry.load(group, name)


def test_an_empty_group_says_that_nothing_is_there():
    with pytest.raises(ConfigError, match="nothing is registered there; is the package installed"):
        registry.load("no.such.group", "x")


@pytest.mark.parametrize("source", ["raise ValueError('half installed')", "import no_such_module", "x = 1"])
def test_what_cannot_be_loaded_is_an_error_that_names_the_package(register, source):
    register("broken", source, {GROUP: {"broken": "broken:Job"}})
    with pytest.raises(ConfigError, match=r"'broken' is registered in mlo.problems as broken:Job, .* reinstall"):
        registry.load(GROUP, "broken")


def test_a_name_that_two_packages_register_means_neither(register):
    register("first", "Job = int", {GROUP: {"twice": "first:Job"}})
    register("second", "Job = str", {GROUP: {"twice": "second:Job"}})
    with pytest.raises(ConfigError, match="for first:Job and for second:Job; uninstall"):
        registry.load(GROUP, "twice")


def test_a_package_seen_twice_on_the_path_is_one(register, monkeypatch):
    site = register("once", "Job = int", {GROUP: {"once": "once:Job"}})
    monkeypatch.syspath_prepend(f"{site}/../{site.name}")
    assert registry.load(GROUP, "once") is int


def test_the_summary_of_a_class_is_read_without_importing_it(register):
    source = """raise RuntimeError("imported")
class Fig:
    \"\"\"A fig.

    Sweet.
    \"\"\"
class Bare: pass
"""
    register("figs", source, {"some.group": {"fig": "figs:Fig", "bare": "figs:Bare"}})
    assert registry.summary_of("some.group", "fig") == "A fig."
    assert registry.summary_of("some.group", "bare") == ""


def test_the_summary_of_what_is_no_class_in_a_source_file_is_that_of_the_loaded_object(register):
    register("quinces", "from pathlib import Path as Quince", {"some.group": {"quince": "quinces:Quince"}})
    assert registry.summary_of("some.group", "quince") == registry.summary(Path)


def test_no_package_is_imported_to_find_a_class_in_it(register):
    site = register("orchard", "", {"some.group": {"tree": "garden.trees:Tree"}})
    (site / "garden").mkdir()
    (site / "garden/__init__.py").write_text("raise RuntimeError('imported')")
    (site / "garden/trees.py").write_text("class Tree:\n    'A tree.'")
    assert registry.summary_of("some.group", "tree") == "A tree."


@pytest.mark.parametrize("source", ["import no_such_module", "class Job(:"])
def test_an_entry_that_cannot_be_loaded_has_no_summary(register, source):
    register("broken", source, {GROUP: {"broken": "broken:Job"}})
    with pytest.raises(ConfigError, match="which cannot be loaded"):
        registry.summary_of(GROUP, "broken")


def test_an_entry_that_needs_an_extra_names_the_command_that_installs_it(register, monkeypatch):
    register("pictures", "import sklearn", {GROUP: {"pictures": "pictures:Job"}})
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"'pictures' needs scikit-learn, .* pip install '\.\[lbt\]'$"):
        registry.load(GROUP, "pictures")


def test_a_file_that_hides_the_registered_package_is_an_error_and_is_not_executed(register, monkeypatch, tmp_path):
    register("plums", "class Plum:\n    'A plum.'", {"some.group": {"plum": "plums:Plum"}})
    hiding = tmp_path / "mine" / "plums.py"
    hiding.parent.mkdir()
    hiding.write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(hiding.parent)
    for found in (registry.load, registry.summary_of):
        with pytest.raises(ConfigError, match=f"'plum' .* as plums:Plum, but {hiding} hides that package; rename"):
            found("some.group", "plum")


def test_a_package_may_register_what_another_one_has(register):
    register("melons", "Melon = int", {})
    register("stand", "", {"some.group": {"melon": "melons:Melon"}})
    assert registry.load("some.group", "melon") is int
