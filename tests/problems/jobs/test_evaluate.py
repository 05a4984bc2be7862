"""The evaluation phase as a user runs it: a published architecture, a searched one, and what is no architecture."""

from __future__ import annotations

import csv
import io
import json

import pytest

from mlo import ConfigError
from problems.jobs.evaluate import find_genotype
from problems.nas import PUBLISHED, EvaluationNetwork, Genotype

SMALL = [
    "--steps=4",
    "--training.channels=2",
    "--training.cells=1",
    "--data.train-size=40",
    "--data.validation-size=40",
]


def test_a_published_architecture_and_then_the_one_of_that_run(command_line, tmp_path):
    code, _, err = command_line("run", "evaluate", "--genotype", "PDARTS", *SMALL, "--output", tmp_path / "a")
    assert code == 0, err
    first = json.loads((tmp_path / "a" / "results.json").read_text())["network"]
    network = EvaluationNetwork(PUBLISHED["PDARTS"], 2, 1, image_channels=1)
    assert first["parameters"] == sum(p.numel() for p in network.parameters())
    assert first["multiply_adds"] > 1000
    assert Genotype.load(tmp_path / "a" / "genotype.json") == PUBLISHED["PDARTS"]
    code, _, err = command_line("run", "evaluate", "--genotype", tmp_path / "a", *SMALL, "--output", tmp_path / "b")
    assert code == 0, err
    second = json.loads((tmp_path / "b" / "results.json").read_text())["network"]
    assert second["test_error"] == first["test_error"]
    _, out, err = command_line("compare", tmp_path, "--format", "csv")
    rows = [(row["option.genotype"], row["genotype"]) for row in csv.DictReader(io.StringIO(out))]
    assert rows == [(name, name) for name in ("PDARTS", str(tmp_path / "a"))], err
    copy = tmp_path / "b" / "genotype.json"
    copy.write_text(copy.read_text().replace("sep_conv_3x3", "sep_conv_5x5", 1))
    code, _, err = command_line("resume", tmp_path / "b")
    assert (code, "genotype.json: cannot be read (its content does not match genotype.json.sha256)" in err) == (2, True)


def test_what_is_no_architecture_is_an_error_before_anything_is_trained(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'PDART' is not known .* did you mean PDARTS\? there are: DARTS_V1, DARTS_V2"
    ):
        find_genotype("PDART")
    with pytest.raises(
        ConfigError, match=r"the genotype\.json in .* cannot be read .* give the folder of a run that has found"
    ):
        find_genotype(str(tmp_path))
    (tmp_path / "broken.json").write_text('{"normal": [], "reduce": []}')
    with pytest.raises(ConfigError, match=r"broken\.json is not a genotype"):
        find_genotype(str(tmp_path / "broken.json"))


def test_a_sweep_reports_an_unknown_architecture_before_anything_runs(command_line, tmp_path):
    grid = ("--grid.genotype", "[PDARTS, PDART]")
    code, out, err = command_line("sweep", "evaluate", *grid, *SMALL, "--output", tmp_path / "s")
    assert (code, out) == (2, "")
    assert "s/genotype=PDART,seed=0: genotype: 'PDART' is not known" in err
    assert not (tmp_path / "s").exists()


def test_a_head_that_the_images_are_too_small_for_is_an_error_before_anything_runs(command_line, tmp_path):
    words = ("--genotype", "PDARTS", "--training.auxiliary", *SMALL)
    code, out, err = command_line("sweep", "evaluate", *words, "--output", tmp_path / "s")
    assert (code, out) == (2, "")
    assert "auxiliary: the head needs images of at least 32x32" in err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--genotype", "PDART"), "did you mean PDARTS"),
        (
            ("--genotype", "PDARTS", "--data.source", "cifar11"),
            "data.source: 'cifar11' does not exist; did you mean cifar10",
        ),
    ],
)
def test_wrong_options_are_reported_and_leave_nothing(command_line, tmp_path, words, message):
    code, out, err = command_line("run", "evaluate", *words, *SMALL, "--output", tmp_path / "r")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["x" * 10**5, "/dev/zero"])
def test_a_genotype_that_cannot_be_a_file_is_an_error(name):
    with pytest.raises(ConfigError, match=r"^genotype: "):
        find_genotype(name)
