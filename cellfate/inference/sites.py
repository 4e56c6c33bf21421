"""Three rules by which a likelihood becomes Gaussian sites, one interface.

Each rule says what the sites should be given the current posterior, what the free energy is, and what its gradient needs beyond
sites held fixed. Notation: q = N(m, Sigma) with marginal variances v, f = log p(y|eta) at eta = u + shift.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from cellfate.engines.base import Posterior, Sites
from cellfate.inference.krylov import gmres
from cellfate.model.families import Expectation, Family, Outcome, Remainder, quadrature


@dataclass(frozen=True)
class Likelihood:
    """A family with its data at a batch of points: `shift` (points or 1, n) is added to the latent field."""

    family: Family
    outcome: Outcome
    shift: Tensor
    phi: Tensor | None  # (points, 1)

    def __getitem__(self, index: Tensor) -> Likelihood:
        shift = self.shift[index] if self.shift.shape[0] > 1 else self.shift
        phi = None if self.phi is None else self.phi[index]
        return Likelihood(self.family, self.outcome, shift, phi)

    def detach(self) -> Likelihood:
        phi = None if self.phi is None else self.phi.detach()
        return Likelihood(self.family, self.outcome, self.shift.detach(), phi)

    def expect(self, mean: Tensor, variance: Tensor) -> Expectation:
        return self.family.expect(self.outcome, mean + self.shift, variance, self.phi)

    def correction(self, mean: Tensor, variance: Tensor) -> Tensor:
        return self.family.correction(self.outcome, mean + self.shift, variance, self.phi)

    def integrals(self, mean: Tensor, variance: Tensor, higher: bool = True) -> tuple[Expectation, Remainder]:
        return self.family.integrals(self.outcome, mean + self.shift, variance, self.phi, higher)

    @property
    def live(self) -> bool:
        """Whether a derivative in its own parameters is wanted."""
        return self.shift.requires_grad or (self.phi is not None and self.phi.requires_grad)

    def at(self, mean: Tensor) -> Expectation:
        return self.family.at(self.outcome, mean + self.shift, self.phi)

    def start(self, points: int) -> Sites:
        """Sites from each cell on its own."""
        eta = self.family.start(self.outcome).expand(points, -1)
        return _sites(self.family.at(self.outcome, eta, self.phi), eta - self.shift)


@dataclass(frozen=True)
class Update:
    """Where the sites should go, and what has to rise on the way (points,)."""

    target: Sites
    objective: Tensor


class Rule(ABC):
    """How sites are made from a posterior."""

    name: str
    monotone = True  # every accepted step must raise the objective
    first_step = 1.0

    @abstractmethod
    def update(self, likelihood: Likelihood, posterior: Posterior) -> Update: ...

    @abstractmethod
    def free_energy(self, likelihood: Likelihood, posterior: Posterior) -> Tensor: ...

    def drift(self, likelihood: Likelihood, posterior: Posterior, mean_step: Tensor, variance_step: Tensor) -> Tensor:
        """Change (points,) of the free energy as the posterior takes a small step to where its sites want it; 0 if unknown.

        To first order a bound does not change, it is stationary; to second order the step gains half of what it was pulled along.
        """
        return posterior.mean.new_zeros(posterior.mean.shape[:-1])

    def between(self, likelihood: Likelihood, posterior: Posterior) -> Tensor:
        """What of the log evidence (points,) lies between cells: the search for the mode, which goes by :meth:`free_energy`, leaves it out."""
        return posterior.mean.new_zeros(posterior.mean.shape[:-1])

    @abstractmethod
    def parameter_part(
        self, likelihood: Likelihood, posterior: Posterior, accuracy: float = 1e-7
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A scalar (points,) with the derivative in the likelihood's own parameters; `pair` and `omega` of the surrogate.

        `accuracy` is the relative one to which what moves through the sites is solved for.
        """


def _sites(e: Expectation, mean: Tensor) -> Sites:
    precision = e.precision.clamp(min=0.0)
    return Sites(precision, precision * mean + e.slope)


class Laplace(Rule):
    """Mode and curvature: the expectations replaced by their values at m."""

    name = "laplace"

    def update(self, likelihood: Likelihood, posterior: Posterior) -> Update:
        e = likelihood.at(posterior.mean)
        objective = e.value.sum(-1) - 0.5 * (posterior.mean * posterior.weights).sum(-1)
        return Update(_sites(e, posterior.mean), objective)

    def free_energy(self, likelihood: Likelihood, posterior: Posterior) -> Tensor:
        return self.update(likelihood, posterior).objective - 0.5 * posterior.log_det

    def drift(self, likelihood: Likelihood, posterior: Posterior, mean_step: Tensor, variance_step: Tensor) -> Tensor:
        # -d log|B| / 2 = -v' d tau / 2
        return _relative(variance_step, posterior).sum(-1) / 2

    def parameter_part(
        self, likelihood: Likelihood, posterior: Posterior, accuracy: float = 1e-7
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        m = posterior.mean.detach().requires_grad_(True)
        held = likelihood.detach()
        with torch.enable_grad():
            precision = held.at(m).precision
            if not precision.requires_grad:  # a gaussian likelihood: nothing moves with the mode
                e = likelihood.at(posterior.mean)
                return (e.value - 0.5 * posterior.variance * e.precision).sum(-1), None, None
            (steepening,) = torch.autograd.grad(precision.sum(), m)
        weight = -0.5 * posterior.variance * steepening  # of dm, through log|B|
        slope_weight = posterior.smooth(weight[..., None])[..., 0]
        e = likelihood.at(posterior.mean)
        part = (e.value - 0.5 * posterior.variance * e.precision + slope_weight * e.slope).sum(-1)
        return part, _through_prior(posterior, weight), None


class Variational(Rule):
    """Variational Laplace; the bound is corrected, cell by cell, for what the Gaussian could not absorb."""

    name = "variational"

    def update(self, likelihood: Likelihood, posterior: Posterior) -> Update:
        e = self._expectation(likelihood, posterior)
        return Update(_sites(e, posterior.mean), e.value.sum(-1) - divergence(posterior))

    def free_energy(self, likelihood: Likelihood, posterior: Posterior) -> Tensor:
        e, rest = self._integrals(likelihood, posterior)
        return e.value.sum(-1) + rest.correction.sum(-1) - divergence(posterior)

    def drift(self, likelihood: Likelihood, posterior: Posterior, mean_step: Tensor, variance_step: Tensor) -> Tensor:
        _, rest = self._integrals(likelihood, posterior)
        correction = (rest.slope_mean * mean_step + rest.slope_variance * variance_step).sum(-1)
        # of variances the part of each cell alone: d tau' (Sigma o Sigma) d tau / 4, the diagonal of it
        return correction + _relative(variance_step, posterior).square().sum(-1) / 4

    def between(self, likelihood: Likelihood, posterior: Posterior) -> Tensor:
        if likelihood.family.quadratic:
            return super().between(likelihood, posterior)
        # the integrals are at hand, the free energy asked for them
        return self._integrals(likelihood, posterior)[1].between(posterior.variance, posterior.smooth)

    @classmethod
    def _expectation(cls, likelihood: Likelihood, posterior: Posterior) -> Expectation:
        """Alone where the rest is dear: most updates are followed by another."""
        if not likelihood.family.dear:
            return cls._integrals(likelihood, posterior)[0]
        held = likelihood.detach()
        return posterior.noted("expectation", lambda: held.expect(posterior.mean, posterior.variance))

    @staticmethod
    def _integrals(likelihood: Likelihood, posterior: Posterior, higher: bool = False) -> tuple[Expectation, Remainder]:
        """Of higher order only where they are asked for, if these are dear."""
        held, all_of = likelihood.detach(), higher or not likelihood.family.dear
        name = "all integrals" if all_of else "integrals"
        return posterior.noted(name, lambda: held.integrals(posterior.mean, posterior.variance, all_of))

    def parameter_part(
        self, likelihood: Likelihood, posterior: Posterior, accuracy: float = 1e-7
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if likelihood.family.quadratic:  # the bound is exact
            return likelihood.expect(posterior.mean, posterior.variance).value.sum(-1), None, None
        _, rest = self._integrals(likelihood, posterior, higher=True)
        lambda_m, lambda_v = _adjoint(posterior, rest, accuracy)
        part = torch.zeros_like(posterior.mean)
        if likelihood.live:
            slope_weight = posterior.smooth(lambda_m[..., None])[..., 0]
            precision_weight = posterior.smooth_squared(lambda_v[..., None])[..., 0]
            live = likelihood.expect(posterior.mean, posterior.variance)
            part = live.value + likelihood.correction(posterior.mean, posterior.variance)
            part = part + slope_weight * live.slope - precision_weight * live.precision
        tau = posterior.sites.precision
        seen = tau > 1e-12
        omega = torch.where(seen, lambda_v / torch.where(seen, tau, torch.ones_like(tau)).square(), 0.0)
        return part.sum(-1), _through_prior(posterior, lambda_m), omega


def _marginal(posterior: Posterior) -> Tensor:
    """Marginal variances, kept above zero for cells without any prior variance."""
    return posterior.variance.clamp(min=torch.finfo(posterior.variance.dtype).tiny ** 0.5)


def cavity(posterior: Posterior) -> tuple[Tensor, Tensor]:
    """Mean and variance (points, n) of each cell's latent value given the sites of all others."""
    whole = 1 / _marginal(posterior)
    variance = 1 / torch.maximum(whole - posterior.sites.precision, 1e-10 * whole)
    return variance * (whole * posterior.mean - posterior.sites.shift), variance


class ExpectationPropagation(Rule):
    """Sites that match the moments of the tilted distributions."""

    name = "ep"
    monotone = False
    first_step = 0.8

    def _tilted(self, likelihood: Likelihood, posterior: Posterior) -> tuple[Tensor, Tensor, Tensor]:
        """Log normalizer, mean and variance of cavity times likelihood, by quadrature about the current marginal."""
        mean, variance = cavity(posterior)
        marginal = _marginal(posterior)
        x, w = quadrature(posterior.mean)
        z = x.expand(*posterior.mean.shape, -1)
        u = posterior.mean[..., None] + marginal.sqrt()[..., None] * z
        phi = likelihood.family.beside_nodes(likelihood.phi)
        f = likelihood.family.log_prob(likelihood.outcome.beside_nodes, u + likelihood.shift[..., None], phi)
        ratio = 0.5 * z.square() - 0.5 * (u - mean[..., None]).square() / variance[..., None]
        log_weight = torch.log(w) + f + ratio + 0.5 * (marginal / variance).log()[..., None]
        log_z = torch.logsumexp(log_weight, -1)
        p = torch.exp(log_weight - log_z[..., None])
        first = (p * u).sum(-1)
        return log_z, first, (p * (u - first[..., None]).square()).sum(-1)

    def update(self, likelihood: Likelihood, posterior: Posterior) -> Update:
        _, first, second = self._tilted(likelihood, posterior)
        mean, variance = cavity(posterior)
        precision = (1 / second - 1 / variance).clamp(min=0.0)
        shift = first / second - mean / variance
        return Update(Sites(precision, shift), self.free_energy(likelihood, posterior))

    def free_energy(self, likelihood: Likelihood, posterior: Posterior) -> Tensor:
        log_z = self._tilted(likelihood, posterior)[0]
        mean, variance = cavity(posterior)
        gaussian = 0.5 * (posterior.mean.square() / _marginal(posterior) - mean.square() / variance)
        gaussian = gaussian - 0.5 * torch.log1p(posterior.sites.precision * variance)
        prior = 0.5 * (posterior.sites.shift * posterior.mean).sum(-1) - 0.5 * posterior.log_det
        return prior + (log_z - gaussian).sum(-1)

    def parameter_part(
        self, likelihood: Likelihood, posterior: Posterior, accuracy: float = 1e-7
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._tilted(likelihood, posterior)[0].sum(-1), None, None


def _relative(variance_step: Tensor, posterior: Posterior) -> Tensor:
    return variance_step / posterior.variance.clamp(min=torch.finfo(variance_step.dtype).tiny)


def divergence(posterior: Posterior) -> Tensor:
    """KL(q || prior) (points,), for any sites."""
    information = (posterior.sites.precision * posterior.variance).sum(-1)
    return 0.5 * (posterior.log_det - information + (posterior.mean * posterior.weights).sum(-1))


def _through_prior(posterior: Posterior, x: Tensor) -> Tensor:
    """(I - R K) x, the transpose of Sigma K^-1."""
    columns = x[..., None]
    return (columns - posterior.residual(posterior.prior_times(columns)))[..., 0]


def _adjoint(posterior: Posterior, rest: Remainder, accuracy: float) -> tuple[Tensor, Tensor]:
    """How the correction, with derivatives c_m, c_v in (m, v), feels a change of the fixed point that (m, v) is.

    At the fixed point m = K E f' and v = diag Sigma(-E f''). Differentiating both and transposing gives, with D3 = E f''' and
    D4 = E f'''' on the diagonal and S2 = Sigma o Sigma,

        l_m - D3 S2 l_v = c_m,    l_v - D3 Sigma l_m / 2 - D4 S2 l_v / 2 = c_v.

    Where a cell has several fields, D3 and D4 are matrices of it, and E f'' has entries beside the diagonal.
    """
    n = rest.slope_mean.shape[-1]

    def apply(x: Tensor) -> Tensor:
        l_m, l_v = x[..., :n], x[..., n:]
        smoothed = posterior.smooth(l_m[..., None])[..., 0]
        squared = posterior.smooth_squared(l_v[..., None])[..., 0]
        back_m, back_v = rest.pull(smoothed, squared)
        return torch.cat([l_m - back_m, l_v - back_v], -1)

    solution = gmres(apply, torch.cat([rest.slope_mean, rest.slope_variance], -1), rtol=accuracy)
    return solution[..., :n], solution[..., n:]


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Laplace, Variational, ExpectationPropagation)}
