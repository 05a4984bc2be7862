"""What a job prepares does not depend on when it is prepared: a run that died at any moment ends as an unbroken one."""

import random
from functools import cached_property

import numpy as np
import pytest
import torch
from interruption import PowerCutError, before_each_step

from mlo.errors import ConfigError
from mlo.ops.rng import seeded
from mlo.runs.folder import read_results
from mlo.runs.run import Run


@pytest.fixture
def job(ridge, monkeypatch):
    """A job of two stages with shared data, which its check uses too, and draws of its own between them."""

    class TwoStages(ridge.RidgeJob):
        steps: int = 4

        @cached_property
        def data(self):
            return torch.randn(8, 4), torch.tensor(np.random.randn(8, 1), dtype=torch.float32) * random.random()

        def check(self):
            assert len(self.data) == 2

        def engine(self):
            engine = super().engine()
            noise = torch.rand(()) * self.data[1].mean()
            with torch.no_grad():
                engine.problems["fit"].module[0].bias.add_(noise)
            return engine

        def run(self, run):
            def stage(name):
                def build():
                    return before_each_step(self.engine(), lambda rounds: dies(name, rounds))

                return run.stage(name, build, self.steps, lambda engine: dict(engine.metrics()))

            drawn = [torch.rand(()).item()]
            first = stage("first")
            drawn += [torch.rand(()).item(), random.random(), np.random.rand()]
            return {"first": first, "second": stage("second"), "drawn": {str(i): v for i, v in enumerate(drawn)}}

    def dies(name, rounds):
        if (name, rounds) == dies.at:
            raise PowerCutError

    dies.at = None
    monkeypatch.setattr(ridge, "RidgeJob", TwoStages)
    return TwoStages(device="cpu", log_every=1, checkpoint_every=100), dies


SLOW = [pytest.param(at, marks=pytest.mark.slow) for at in (("first", 0), ("second", 3))]


@pytest.mark.parametrize("at", [("first", 2), ("second", 0), *SLOW])
def test_a_run_of_two_stages_that_died_ends_as_an_unbroken_one(job, tmp_path, at):
    options, dies = job
    for name in ("unbroken", "killed"):
        torch.manual_seed(len(name))
        run = Run.create("ridge", type(options)(**options.model_dump()), tmp_path / name)
        if name == "killed":
            dies.at = at
            with pytest.raises(PowerCutError):
                run.execute()
            dies.at = None
            torch.manual_seed(99)
            run = Run.open(tmp_path / name)  # whose job has prepared nothing
            assert "data" not in vars(run.job)
        run.execute()
    assert read_results(tmp_path / "killed") == read_results(tmp_path / "unbroken")
    one, other = ([Run.open(tmp_path / n).metrics(s) for s in ("first", "second")] for n in ("killed", "unbroken"))
    assert one == other


def test_a_cached_property_of_a_job_has_a_seed_of_its_own_and_changes_no_other_random_numbers(job):
    options, _ = job
    other = type(options)(seed=1)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = options.data
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first[0], type(options)().data[0])
    assert not torch.equal(first[0], other.data[0])


def test_seeded_restores_all_generators():
    def draw():
        return torch.rand(()).item(), np.random.rand(), random.random()

    with seeded(3):
        first = draw()
    with seeded(4):
        before = draw()
        with seeded(3):
            assert draw() == first
        after = draw()
    with seeded(4):
        assert (draw(), draw()) == (before, after)


def test_a_seed_that_torch_cannot_take_is_refused(job):
    options, _ = job
    with pytest.raises(ConfigError, match=r"seed: .* less than 9223372036854775808"):
        type(options)(seed=2**63)
