"""The engine of linear cost: the tree by sweeps, everything else as columns.

The prior is K = A + Z S Z'. A holds the steps along the tree and the variances that a cell has for itself (what a truncated
spatial basis leaves out, an observation-level effect); its factor is a sequence of plane rotations from the leaves to the root
(:mod:`cellfate.trees.sweeps`), Felsenstein's (1973) contrasts in square-root form. The columns Z hold spatial fields, groups and
fixed effects; they never change, hyperparameters only move S. A posterior costs O(n m^2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellfate.engines.base import Engine, Sites
from cellfate.engines.blocks import connect
from cellfate.engines.columns import Apart, Columns, side_by_side, together
from cellfate.engines.lowrank import COLUMNS
from cellfate.engines.made import Made
from cellfate.engines.product_columns import MOST, ProductColumns, has_columns, identity, product_columns
from cellfate.engines.structured_posterior import Part, StructuredPosterior, StructuredPrior, Walk
from cellfate.errors import DataError
from cellfate.kernels.base import Basis, Component, Diagonal, Given, Term, sample_variance
from cellfate.kernels.fates import Loaded
from cellfate.kernels.lineage import LineageKernel, TreeSteps
from cellfate.kernels.product import Hadamard, Product
from cellfate.kernels.spatial import SpatialKernel, Stationary
from cellfate.places.basis import LANDMARKS, FieldBasis, field_basis
from cellfate.trees.plan import TreePlan
from cellfate.trees.sweeps import path_sums, up_sums

PILOT_RANK = 128  # of a field in a first fit, over all length-scales that the data bound
PER_COLUMN = 4  # landmarks that a column needs
EXPECTED_RANK = 512  # before it is known
DOUBTFUL_SHARE = 0.01  # of a field's variance that its columns leave out
REACH = 2.0  # beyond the bounds of a length-scale, where the search may go


class StructuredEngine(Engine):
    """Exact for trees and columns; a spatial field enters by its leading directions, and what they miss by its variance."""

    name = "structured"

    def __init__(
        self,
        components: Sequence[Component],
        n: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        rank: int | None = None,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        rough: bool = False,
        made: Made | None = None,
    ) -> None:
        self.n, self.like = n, torch.empty(0, device=device, dtype=dtype)
        self.rank, self.ranges, self.rough = rank, dict(ranges or {}), rough
        self._made = made
        self._kernels = {component.name: component.kernel for component in components}
        self._components = tuple(components)
        self.plan: TreePlan | None = None
        for kernel in self._kernels.values():
            if isinstance(kernel, LineageKernel):
                self.plan = TreePlan(kernel.forest.parent, kernel.leaf, self.like.device)
        self._fields: dict[str, FieldBasis] = {}
        self._interactions: dict[str, ProductColumns] = {}
        self._information: dict[str, float] = {}
        self._columns: dict[tuple[str, ...], Columns] = {}

    # -- the prior -----------------------------------------------------------------------------------------------------

    def field(self, name: str) -> FieldBasis:
        """The basis of a spatial component, over the length-scales it may take."""
        if name not in self._fields:
            kernel = self._kernels[name]
            assert isinstance(kernel, SpatialKernel)
            low, high = self._window(name, kernel)
            settings = {
                "rank": self.rank,
                "information": 0.0 if self.rank is not None else self._information.get(name, 0.0),
                **self._landmarks(),
            }

            def make() -> FieldBasis:
                return field_basis(
                    kernel.coordinates,
                    kernel.correlation,
                    low,
                    high,
                    specimen=kernel.specimens,
                    like=self.like,
                    **settings,  # type: ignore[arg-type]
                )

            if self._made is None:
                self._fields[name] = make()
            else:
                arrays = kernel.coordinates, kernel.specimens
                self._fields[name] = self._made.find(arrays, (type(kernel), low, high, *sorted(settings.items())), make)
        return self._fields[name]

    def _window(self, name: str, kernel: SpatialKernel) -> tuple[float, float]:
        """Length-scales that the columns of a spatial component have to serve."""
        (hyper,) = kernel.hyperparameters
        wide = (hyper.lower / REACH, hyper.upper * REACH) if hyper.fixed is None else (hyper.lower, hyper.upper)
        return self.ranges.get(name, wide)

    def interaction(self, name: str) -> ProductColumns:
        """The columns of a product of tree and field, over the shapes that these may take."""
        if name not in self._interactions:
            kernel = self._kernels[name]
            assert isinstance(kernel, Product)
            field = kernel.other
            low, high = self._window(kernel.names[1], field) if isinstance(field, SpatialKernel) else (1.0, 1.0)
            landmarks = self._landmarks().get("landmarks", LANDMARKS)

            def make() -> ProductColumns:
                return product_columns(
                    kernel, lower=low, upper=high, rank=self.rank, landmarks=landmarks, like=self.like
                )

            known = identity(kernel)
            if self._made is None or known is None:
                self._interactions[name] = make()
            else:
                of, arrays = known
                self._interactions[name] = self._made.find(arrays, (*of, low, high, self.rank, landmarks), make)
        return self._interactions[name]

    def _landmarks(self) -> dict[str, int]:
        """Fewer landmarks than by default, where a known rank or a first fit needs no more."""
        if self.rank is None or not (self.rough or self.n > LANDMARKS):
            return {}
        return {"landmarks": min(LANDMARKS, max(PER_COLUMN * self.rank, 0 if self.rough else LANDMARKS // 2))}

    def focus(
        self, ranges: Mapping[str, tuple[float, float]], information: Mapping[str, float] | None = None
    ) -> StructuredEngine:
        engine = self._like(ranges={**self.ranges, **ranges})
        engine.plan, engine._information = self.plan, dict(information or {})
        return engine

    @property
    def approximates(self) -> bool:
        """Whether there is a spatial field or an interaction; trees and columns are exact."""
        return any(isinstance(kernel, SpatialKernel | Product) for kernel in self._kernels.values())

    def fields(self) -> tuple[str, ...]:
        return tuple(
            name
            for name, kernel in self._kernels.items()
            if isinstance(kernel, SpatialKernel) and any(h.fixed is None for h in kernel.hyperparameters)
        )

    def shared(self) -> StructuredEngine:
        engine = self._like(made=Made())
        engine.plan = self.plan
        return engine

    def pilot(self, components: Sequence[Component], cells: np.ndarray) -> StructuredEngine:
        rank = PILOT_RANK if self.rank is None else min(PILOT_RANK, self.rank)
        return self._like(components, len(cells), rank=rank, rough=True)

    def _phi(self, term: Term) -> Tensor | None:
        """Columns (n, m) of a component; None where it has none."""
        if isinstance(term.structure, Stationary):
            return self.field(term.name).phi
        if isinstance(term.structure, Hadamard):
            return self.interaction(term.name).phi
        return term.structure.phi if isinstance(term.structure, Basis) else None

    def part(self, term: Term) -> Part:
        """A component at its hyperparameters, differentiable in them."""
        structure = term.structure
        if isinstance(structure, TreeSteps):
            assert self.plan is not None
            scale = term.variance[..., None]
            if term.normalized:
                scale = scale / self._scale(term.name, *tree_moments(self.plan, structure))[..., None]
            return Part(Walk(self.plan, structure.gain, scale * structure.noise))
        if isinstance(structure, Stationary):
            field = self.field(term.name)
            moments = field.trace(structure.lengthscale), field.total(structure.lengthscale)
            scale = term.variance / self._scale(term.name, *moments)
            spectrum = scale[..., None, None] * field.spectrum(structure.lengthscale)
            own = scale[..., None] * field.left_out(structure.lengthscale)
            return Part(spectrum=spectrum, diagonal=False, own=own, blocks=tuple(field.slices))
        if isinstance(structure, Hadamard):
            columns = self.interaction(term.name)
            spectrum, own = columns.parts(structure)
            scale = term.variance / self._scale(term.name, *columns.moments(spectrum, own))
            return Part(spectrum=scale[..., None, None] * spectrum, diagonal=False, own=scale[..., None] * own)
        scale = term.variance[..., None]
        if isinstance(structure, Diagonal):
            return Part(own=scale * structure.variances)
        assert isinstance(structure, Basis)
        if structure.root is not None:
            assert not term.normalized
            return Part(
                spectrum=scale[..., None] * structure.spectrum,
                diagonal=False,
                root=scale[..., None].sqrt() * structure.root,
            )
        if term.normalized:
            trace = (structure.spectrum * structure.phi.square().sum(0)).sum(-1)
            total = (structure.spectrum * structure.phi.sum(0).square()).sum(-1)
            scale = scale / self._scale(term.name, trace, total)[..., None]
        return Part(spectrum=scale * structure.spectrum)

    def _scale(self, name: str, trace: Tensor, total: Tensor) -> Tensor:
        scale = sample_variance(trace, total, self.n, self._kernels[name].copies)
        if not bool((scale > 1e-12 * trace / self.n).all()):
            raise DataError(
                f"component {name!r} is constant over the cells: it cannot explain any variation. Leave it out, or, for a "
                "spatial field, give a `lengthscale` well below the extent of the tissue."
            )
        return scale

    def columns(self, terms: Sequence[Term]) -> Columns:
        """Columns of all components, side by side where sets of cells that never meet have their own."""
        key = tuple(term.name for term in terms)
        # a design is not of the engine's making: another response of the same cells may come with another one
        design = next((term for term in terms if term.name not in self._kernels), None)
        if key in self._columns and design is not None:
            known = self._columns[key].of(design.name)[1]
            now = self._phi(design)
            if now is not None and not torch.equal(known, now):  # False where shapes differ, too
                del self._columns[key]
        if key not in self._columns:
            label, fields = self._sets(terms)
            if fields:
                apart = {name: Apart(*self.field(name).by_block) for name in fields}
                rest = {
                    term.name: phi for term in terms if term.name not in fields and (phi := self._phi(term)) is not None
                }
                self._columns[key] = side_by_side(apart, rest, label, self.like)
            else:
                parts = {term.name: phi for term in terms if (phi := self._phi(term)) is not None}
                self._columns[key] = together(parts, self.n, self.like)
        return self._columns[key]

    def _sets(self, terms: Sequence[Term]) -> tuple[np.ndarray, list[str]]:
        """Sets of cells (n,) that neither the tree nor a field connects, and the fields that are apart by them; none, if all meet."""
        names = [term.name for term in terms if term.name in self._kernels]
        fields = [name for name in names if isinstance(self._kernels[name], SpatialKernel)]
        walks = [name for name in names if isinstance(self._kernels[name], LineageKernel)]
        labels = [label for name in fields + walks if (label := self._kernels[name].independent()) is not None]
        label = connect(labels, self.n)
        return (label, fields) if fields and label.max() > 0 else (label, [])

    def prepare(self, terms: Sequence[Term]) -> StructuredPrior:
        parts = {term.name: self.part(term) for term in terms}
        columns = self.columns(terms)
        batch = torch.broadcast_shapes(*(term.variance.shape for term in terms))
        factor = self.like.new_zeros(*batch, columns.layout.total, columns.layout.total)
        own, walk = self.like.new_zeros(*batch, 1), None
        for name, part in parts.items():
            if part.spectrum is not None:
                slot = columns.slots[name]
                factor[..., slot, slot] = square_root(part)
            if part.own is not None:
                own = own + part.own
            walk = part.walk or walk
        return StructuredPrior(tuple(terms), parts, walk, own.expand(*batch, self.n), factor)

    def select(self, prior: object, index: Tensor) -> StructuredPrior:
        assert isinstance(prior, StructuredPrior)
        walk = None if prior.walk is None else prior.walk[index]
        parts = {name: part[index] for name, part in prior.parts.items()}
        return StructuredPrior((), parts, walk, prior.own[index], prior.factor[index])

    def condition(self, terms: Sequence[Term], sites: Sites, prior: object | None = None) -> StructuredPosterior:
        prepared = self.prepare(terms) if prior is None else prior
        assert isinstance(prepared, StructuredPrior)
        return StructuredPosterior(self, prepared, self.columns(terms), sites)

    def at(self, components: Sequence[Component], cells: np.ndarray) -> StructuredEngine:
        return self._like(components, len(cells))

    def _like(
        self, components: Sequence[Component] | None = None, n: int | None = None, **changes: Any
    ) -> StructuredEngine:
        """The same settings, but for `changes`, for other components and cells or for these."""
        settings = {"rank": self.rank, "ranges": self.ranges, "made": self._made, **changes}
        of = (self._components, self.n) if components is None or n is None else (components, n)
        return StructuredEngine(*of, device=self.like.device, dtype=self.like.dtype, **settings)

    def points_at_once(self, memory: float) -> int:
        return max(1, int(memory / self.bytes_per_point()))

    def width(self) -> int:
        """Columns of all components; a guess for fields whose basis is not made yet."""
        total = 0
        for name, kernel in self._kernels.items():
            if name in self._fields:
                total += self._fields[name].rank
            elif isinstance(kernel, SpatialKernel):
                total += min(self.rank or EXPECTED_RANK, self.n)
            elif isinstance(kernel, Product):
                total += min(self.rank or MOST, self.n)
            elif not isinstance(kernel, LineageKernel):
                held = {h.name: self.like.new_full((1,), h.lower) for h in kernel.hyperparameters}
                held["sd"] = self.like.new_ones(1)
                structure = kernel.structure(held, self.like)
                total += structure.phi.shape[1] if isinstance(structure, Basis) else 0
        return total

    def bytes_shared(self) -> float:
        """Memory of the columns: a field's own, and those of all components beside each other."""
        return 2.0 * self.n * self.width() * self.like.element_size()

    def bytes_per_point(self) -> float:
        """Memory that one hyperparameter point needs beside what all share."""
        m, nodes = self.width(), 0 if self.plan is None else self.plan.n_nodes
        numbers = self.n * (2 * m + 4 * COLUMNS) + 8 * m * m + 12 * (nodes + self.n)
        return float(numbers * self.like.element_size())

    def report(self, values: Mapping[str, float]) -> tuple[dict[str, Any], list[str]]:
        found: dict[str, Any] = {}
        doubts = []
        for name, columns in self._interactions.items():
            shapes = {h.parameter(of): h.fixed for kernel, of in columns.kernel.factors for h in kernel.hyperparameters}
            held = {called: self.like.new_tensor(values.get(called, fixed)) for called, fixed in shapes.items()}
            left = columns.truncated_share(columns.kernel.structure(held, self.like))
            found |= {f"rank_{name}": columns.rank, f"truncated_share_{name}": left}
            if left > DOUBTFUL_SHARE:
                doubts.append(
                    f"{columns.rank} columns for {name!r} leave {left:.1%} of its variance to the cells themselves: give a larger "
                    "`rank`, or engine='dense'"
                )
        for name, field in self._fields.items():
            at = values.get(f"lengthscale_{name}", field.reference)
            left = float(field.left_out(self.like.new_tensor(at)).mean())
            found |= {f"rank_{name}": field.rank, f"covariance_error_{name}": field.errors[1]}
            found |= {f"truncated_share_{name}": left, f"meets_tolerance_{name}": field.meets_tolerance}
            if left > DOUBTFUL_SHARE:
                doubts.append(
                    f"{field.rank} columns for {name!r} leave {left:.1%} of its variance to the cells themselves, at length-scale "
                    f"{at:.3g}: give a larger `rank`, or engine='dense'"
                )
        return found, doubts


def refusal(components: Sequence[Component]) -> str | None:
    """Why this engine cannot serve the components; None where it can."""
    given = [c.name for c in components if isinstance(c.kernel, Given)]
    trees = [c.name for c in components if isinstance(c.kernel, LineageKernel)]
    products = [c.name for c in components if isinstance(c.kernel, Product) and not has_columns(c.kernel)]
    if any(isinstance(c.kernel, Loaded) for c in components):
        return "fates with variances of their own (per_fate=True), and those taken by pairs, need exact matrices so far"
    if products:
        return f"components {products} are products of two kernels that are not a tree and a field, for which it has no columns yet"
    if given:
        return f"components {given} are covariance matrices, which have no structure"
    if len(trees) > 1:
        return f"components {trees} are trees, and it sweeps along one"
    return None


def tree_moments(plan: TreePlan, steps: TreeSteps) -> tuple[Tensor, Tensor]:
    """Tr K and 1' K 1 among the cells, each (...,), differentiable in gain and noise."""
    gain = None if steps.gain is None else steps.gain.detach()
    ones = steps.noise.new_ones(plan.n_cells, 1)
    below = up_sums(plan, gain, ones)[..., 0]
    total = (steps.noise * below.square()).sum(-1)
    if gain is None or steps.gain is None:
        return (steps.noise * below).sum(-1), total
    field = path_sums(plan, gain, steps.noise.detach(), ones)[..., 0]
    pull = 2 * below * torch.where(plan.parent < 0, 0.0, field[..., plan.parent.clamp(min=0)])
    total = total + (pull * (steps.gain - gain)).sum(-1)  # zero, with the derivative in the gain
    return steps.marginals()[1][..., plan.leaf].sum(-1), total


def square_root(part: Part) -> Tensor:
    """F (..., m, m) with F F' = S; a matrix that rounding has left a little indefinite is cut at zero."""
    spectrum = part.spectrum
    assert spectrum is not None
    if part.diagonal:
        return torch.diag_embed(spectrum.sqrt())
    if part.root is not None:
        return part.root
    if part.blocks is None or len(part.blocks) == 1:
        return _symmetric_root(spectrum)
    out = torch.zeros_like(spectrum)
    for block in part.blocks:
        out[..., block, block] = _symmetric_root(spectrum[..., block, block])
    return out


def _symmetric_root(spectrum: Tensor) -> Tensor:
    """By Cholesky's factor, a tenth of the work of eigenvectors; by these where rounding has left it indefinite."""
    lower, info = torch.linalg.cholesky_ex(spectrum)
    if not bool(info.any()):
        return lower
    values, vectors = torch.linalg.eigh(spectrum)
    root = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    return torch.where((info != 0)[..., None, None], root, lower)
