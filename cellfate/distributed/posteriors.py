"""The job of one response: its posterior under one model, or under each of several trees."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cellfate._runtime import one_of_many
from cellfate.distributed.tasks import Job, Work
from cellfate.engines.base import Sites
from cellfate.errors import CellfateWarning
from cellfate.inference.fit import GLMM
from cellfate.inference.hyperposterior import Hyperposterior
from cellfate.inference.mode import Mode
from cellfate.inference.report import Integrated
from cellfate.kernels.base import Component
from cellfate.model.glmm import Model


@dataclass(frozen=True, eq=False)
class Ask:
    """Components in place of those of the model (None: its own), and random numbers."""

    components: Sequence[Component] | None
    rng: np.random.Generator


@dataclass(frozen=True, eq=False)
class Found:
    """What :class:`Integrated` holds beside the model, in arrays: all that a report asks of a mode, and no tensor of a device."""

    u: np.ndarray  # (d,)
    free_energy: float
    log_posterior: float
    at_bound: tuple[str, ...]
    evaluations: int
    converged: bool
    message: str
    posterior: Hyperposterior
    approximate: list[str]
    facts: dict[str, Any]

    @classmethod
    def of(cls, found: Integrated) -> Found:
        """The arrays of a posterior."""
        mode = found.mode
        said = (mode.free_energy, mode.log_posterior, mode.at_bound, mode.evaluations, mode.converged, mode.message)
        return cls(mode.u.cpu().numpy(), *said, found.posterior, list(found.approximate), dict(found.facts))

    def under(self, model: Model, arguments: Mapping[str, Any]) -> Integrated:
        """The posterior, with the model that it is of; of its mode only what is reported."""
        u, nothing = torch.as_tensor(self.u).to(model.data.offset), model.data.offset.new_zeros(0)
        mode = Mode(
            u,
            self.free_energy,
            self.log_posterior,
            nothing,
            Sites(nothing, nothing),
            *(nothing,) * 4,
            self.at_bound,
            self.evaluations,
            self.converged,
            self.message,
        )
        names = (arguments["terms"], arguments["levels"])
        return Integrated(model, mode, self.posterior, *names, list(self.approximate), dict(self.facts))


@dataclass(frozen=True, eq=False)
class PosteriorJob(Job):
    """Posteriors of a response. An :class:`Ask` is answered by one, and by its generator, which has moved on.

    arguments: of :meth:`cellfate.GLMM.posterior`, `rng` apart.
    """

    glmm: GLMM
    arguments: Mapping[str, Any]
    threads: int = 1

    def prepare(self) -> Work:
        def work(ask: Ask) -> tuple[Found, np.random.Generator]:
            glmm = self.glmm if ask.components is None else self.glmm.with_components(ask.components)
            with one_of_many(), warnings.catch_warnings():  # whoever asks says what is to be said of the data
                warnings.simplefilter("ignore", CellfateWarning)
                return Found.of(glmm.posterior(**self.arguments, rng=ask.rng)), ask.rng

        return work
