"""The job of one response: its posterior under one model, or under each of several trees."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cellfate.distributed.tasks import Job, Work
from cellfate.inference.fit import GLMM
from cellfate.inference.report import Integrated
from cellfate.kernels.base import Component


@dataclass(frozen=True, eq=False)
class Ask:
    """Components in place of those of the model (None: its own), and random numbers."""

    components: Sequence[Component] | None
    rng: np.random.Generator


@dataclass(frozen=True, eq=False)
class PosteriorJob(Job):
    """Posteriors of a response. An :class:`Ask` is answered by one, and by its generator, which has moved on.

    arguments: of :meth:`cellfate.GLMM.posterior`, `rng` apart.
    """

    glmm: GLMM
    arguments: Mapping[str, Any]
    threads: int = 1

    def prepare(self) -> Work:
        def work(ask: Ask) -> tuple[Integrated | bytes, np.random.Generator]:
            glmm = self.glmm if ask.components is None else self.glmm.with_components(ask.components)
            found = glmm.posterior(**self.arguments, rng=ask.rng)
            return sent(found, glmm.device), ask.rng

        return work


def sent(found: Integrated, device: torch.device) -> Integrated | bytes:
    """A posterior so that it can be read without the device that it was made on."""
    if device.type == "cpu":
        return found
    out = io.BytesIO()
    torch.save(found, out)
    return out.getvalue()


def received(found: Integrated | bytes) -> Integrated:
    """The posterior that was sent, on the CPU."""
    if isinstance(found, bytes):
        whole = torch.load(io.BytesIO(found), map_location="cpu", weights_only=False)  # from a worker of ours
        assert isinstance(whole, Integrated)
        return whole
    return found
