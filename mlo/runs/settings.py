"""The options that every run has: what its stages need to know of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from mlo.options.config import Config

if TYPE_CHECKING:
    import torch


class RunSettings(Config):
    """Seed, device, threads, length and intervals of a run. :class:`mlo.Job` adds the options of one problem."""

    seed: int = Field(0, ge=0, description="seed of all random numbers: the same seed gives the same run")
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto: a GPU if there is one, else the CPU")
    threads: int | None = Field(
        None, ge=1, description="CPU threads; null leaves the number to torch; small networks are fastest with 1"
    )
    steps: int = Field(1000, ge=1, description="rounds of the main stage")
    log_every: int = Field(10, ge=1, description="rounds between two lines of metrics.jsonl")
    checkpoint_every: int = Field(200, ge=1, description="rounds between two checkpoints")

    @property
    def torch_device(self) -> torch.device:
        """The device that ``device`` stands for on this machine.

        Raises:
            ConfigError: if there is no such device.
        """
        from mlo.training.devices import move_to

        return move_to([], self.device)
