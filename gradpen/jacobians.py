"""J_t = ∇_x h_t of every sample as an operator: products with it, never (unless asked for) the matrices.

Two kinds share one interface. Any differentiable prefix of the model goes through autograd: Jᵀu is a backward pass, J v the
backward pass of a backward pass. A chain of dense layers and elementwise activations multiplies by the weights themselves,
and shares W_1 W_1ᵀ over all samples, so the input width never enters an iteration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradpen._numerics import rounding_tolerance, sum_tensors, widest_float, widest_row_sq_norm
from gradpen._products import times
from gradpen.dense_chain import DenseChain
from gradpen.spectral import normal_start

MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class JacobianOperator:
    """The Jacobians J_b (n × d), one for every sample b.

    Attributes:
        gram: (B, n) → (B, n), u ↦ J Jᵀ u.
        vjp: (B, n) → (B, d), u ↦ Jᵀ u.
        template: (B, n), a tensor of the right shape, type and device.
        columns: d.
        widest: entries of the longest vector on the way.
        part: indices of samples, on the CPU → the operator of these alone, at their share of the cost; None if there is no
            such thing.
        diagonal: (B, n), what the rows of J_b were multiplied by last, 0 where they are known to be 0; None if by nothing.
        gram_within: (u, out) ↦ J Jᵀ u, written into `out`, for u that are 0 where the diagonal is, as the products are
            themselves; None if there is nothing to be gained.
        is_identity: J_b = I for every sample (the input itself).
        grams: of an identity: place of a weight in memory → products with W Wᵀ, which all that is built upon it share.
        last: of D W J': what it was made of.
    """

    gram: MatVec
    vjp: MatVec
    template: Tensor
    columns: int
    widest: int
    part: Callable[[Tensor], JacobianOperator] | None = None
    diagonal: Tensor | None = None
    gram_within: Callable[[Tensor, Tensor], Tensor] | None = None
    is_identity: bool = False
    grams: dict[int, MatVec] = field(default_factory=dict)
    last: Link | None = None

    @classmethod
    def identity(cls, template: Tensor, grams: dict[int, MatVec] | None = None) -> JacobianOperator:
        """J_1 = I."""
        grams = {} if grams is None else grams
        return cls(
            gram=lambda u: u,
            vjp=lambda u: u,
            template=template,
            columns=template.shape[1],
            widest=template.shape[1],
            part=lambda rows: cls.identity(template[:1].expand(len(rows), -1), grams),
            is_identity=True,
            grams=grams,
        )

    def times_weight(self, weight: Tensor, products: tuple[MatVec, MatVec] | None = None) -> JacobianOperator:
        """W J for a weight (m, n), and, where they are known already, the products of rows with W and Wᵀ."""
        template = self.template.new_empty(()).expand(len(self.template), len(weight))
        if self.is_identity and products is None:
            gram = self.grams.setdefault(weight.data_ptr(), gram_of(weight))  # which keeps the weight
            return _shared_jacobian(weight, gram, template)
        part = self.part
        down, up = products if products is not None else (times(weight), times(weight.T))
        return JacobianOperator(
            gram=lambda u: up(self.gram(down(u))),
            vjp=lambda u: self.vjp(u @ weight),
            template=template,
            columns=self.columns,
            widest=max(self.widest, len(weight)),
            part=None if part is None else lambda rows: part(rows).times_weight(weight, (down, up)),
        )

    def times_diagonal(self, diagonal: Tensor, *, is_mask: bool = False) -> JacobianOperator:
        """D J for diagonals (B, n), all of 0 and 1 if `is_mask`."""
        part = self.part

        def gram_within(u: Tensor, out: Tensor) -> Tensor:
            return torch.mul(self.gram(u if is_mask else diagonal * u), diagonal, out=out)

        def restricted(rows: Tensor) -> JacobianOperator:
            assert part is not None
            own = diagonal.index_select(0, rows.to(diagonal.device, non_blocking=True))
            return part(rows).times_diagonal(own, is_mask=is_mask)

        return JacobianOperator(
            gram=lambda u: self.gram(diagonal * u).mul_(diagonal),
            vjp=lambda u: self.vjp(diagonal * u),
            template=self.template,
            columns=self.columns,
            widest=self.widest,
            part=None if part is None else restricted,
            diagonal=diagonal,
            gram_within=gram_within,
        )

    def linked(self, weight: Tensor, diagonal: Tensor, *, is_mask: bool = False) -> JacobianOperator:
        """D W J for a weight (m, n) and diagonals (B, m), all of 0 and 1 if `is_mask`."""
        operator = self.times_weight(weight).times_diagonal(diagonal, is_mask=is_mask)
        return replace(operator, last=Link(self, weight, diagonal, is_mask))

    def with_identity(self) -> JacobianOperator:
        """The same with one more sample, the last, whose Jacobian is I; columns of zeros make up for their numbers."""
        size, part = len(self.template), self.part
        columns = max(self.columns, self.template.shape[1])
        template = self.template.new_empty(()).expand(size + 1, self.template.shape[1])
        if self.is_identity:
            return JacobianOperator.identity(template, self.grams)

        def restricted(rows: Tensor) -> JacobianOperator:
            assert part is not None
            if int(rows[-1]) < size:
                return part(rows)
            return part(rows[:-1]).with_identity() if len(rows) > 1 else JacobianOperator.identity(template[:1])

        whole = None if self.last is None else self.last.with_weight()  # one sample more costs less than a copy of all

        def gram(u: Tensor) -> Tensor:
            if whole is None:
                return torch.cat([self.gram(u[:-1]), u[-1:]])
            product = whole.gram(u)
            product[-1:] = u[-1:]
            return product

        return JacobianOperator(
            gram=gram,
            vjp=lambda u: torch.cat([F.pad(v, (0, columns - v.shape[1])) for v in (self.vjp(u[:-1]), u[-1:])]),
            template=template,
            columns=columns,
            widest=self.widest,
            part=None if part is None else restricted,
        )

    def restricted(self, rows: Tensor) -> JacobianOperator:
        """The operator of some samples, given by indices on the CPU, if need be at the cost of all."""
        if self.part is not None:
            return self.part(rows)
        sent = rows.to(self.template.device, non_blocking=True)

        def padded(product: MatVec) -> MatVec:
            return lambda u: product(torch.zeros_like(self.template).index_copy_(0, sent, u))[sent]

        return JacobianOperator(padded(self.gram), padded(self.vjp), self.template[sent], self.columns, self.widest)

    def materialize(self) -> Tensor:
        """J itself, one row at a time: (B, n, d)."""
        return torch.stack([self.vjp(unit) for unit in self._units()], 1)

    def sq_frobenius_norm(self) -> Tensor:
        """‖J_b‖_F², one row of J at a time: (B,)."""
        return sum_tensors([widest_row_sq_norm(self.vjp(unit)) for unit in self._units()])

    def _units(self) -> Iterator[Tensor]:
        for row in range(self.template.shape[1]):
            unit = torch.zeros_like(self.template)
            unit[:, row] = 1
            yield unit


class Link(NamedTuple):
    """D W J', the way from one layer's input to the next one's."""

    before: JacobianOperator  # J'
    weight: Tensor  # (m, n)
    diagonal: Tensor  # (B, m)
    is_mask: bool

    def with_weight(self) -> JacobianOperator:
        """D W J' with W as one more sample, the last: it costs less so than as an operator of its own."""
        rows = torch.cat([self.diagonal, torch.ones_like(self.diagonal[:1])])
        return self.before.with_identity().linked(self.weight, rows, is_mask=self.is_mask)


def gram_of(weight: Tensor) -> MatVec:
    """u ↦ W Wᵀ u for rows u, by the cheaper way: W Wᵀ is formed once, when first needed, unless W is low.

    Nor is it formed if its entries would underflow, which the products need not do.
    """
    rows, columns = weight.shape

    @functools.cache
    def product() -> MatVec:
        if rows <= 2 * columns:
            formed = _outer_gram(weight)
            if bool(formed.amax() >= torch.finfo(weight.dtype).tiny ** 0.5):
                return times(formed.T)  # as symmetric as rounding leaves it
        down, up = times(weight), times(weight.T)
        return lambda u: up(down(u))

    return lambda u: product()(u)


def _outer_gram(weight: Tensor) -> Tensor:
    """W Wᵀ, of which the part above the diagonal is copied from below, two blocks of rows at a time."""
    rows, half = len(weight), len(weight) // 2
    gram = weight.new_empty(rows, rows)
    torch.mm(weight[:half], weight[:half].T, out=gram[:half, :half])
    torch.mm(weight[half:], weight.T, out=gram[half:])
    gram[:half, half:] = gram[half:, :half].T
    return gram


def _shared_jacobian(weight: Tensor, gram: MatVec, template: Tensor) -> JacobianOperator:
    """W for every sample."""
    return JacobianOperator(
        gram=gram,
        vjp=lambda u: u @ weight,
        template=template,
        columns=weight.shape[1],
        widest=max(weight.shape),
        part=lambda rows: _shared_jacobian(weight, gram, template[:1].expand(len(rows), -1)),
    )


def matrix_operator(weight: Tensor) -> JacobianOperator:
    """One matrix as the operator of a single sample: two products with W, as W Wᵀ would cost more than it saves."""
    return _shared_jacobian(weight, lambda u: (u @ weight) @ weight.T, weight.new_empty(()).expand(1, len(weight)))


@dataclass(frozen=True)
class OperatorStack:
    """The samples of several operators as samples of one that has products with J Jᵀ alone.

    Rows are padded with zeros to the longest, and the operators may have different numbers of columns.
    """

    operators: Sequence[JacobianOperator]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """How many samples each operator has."""
        return [len(operator.template) for operator in self.operators]

    @functools.cached_property
    def length(self) -> int:
        """Of the longest row."""
        return max(operator.template.shape[1] for operator in self.operators)

    def gram_within(self, u: Tensor) -> Tensor:
        """(ΣB, length) → (ΣB, length), u ↦ J Jᵀ u for u that are 0 where the operators' diagonals are."""
        product = torch.empty_like(u)
        for operator, part, out in zip(self.operators, u.split(self.sizes), product.split(self.sizes), strict=True):
            columns = operator.template.shape[1]
            if columns < u.shape[1]:
                part, padding, out = part[:, :columns], out[:, columns:], out[:, :columns]
                padding.zero_()
            if operator.gram_within is None:
                out.copy_(operator.gram(part))
            else:
                operator.gram_within(part, out)
        return product

    def restricted(self, samples: Tensor) -> OperatorStack:
        """The stack of some samples, given by rising indices on the CPU, so that the host waits for no device."""
        ends = torch.tensor(self.sizes, device="cpu").cumsum(0)
        counts = torch.bucketize(samples, ends, right=True).bincount(minlength=len(self.sizes)).tolist()
        found, first = [], 0
        for operator, size, own in zip(self.operators, self.sizes, samples.split(counts), strict=True):
            if len(own):
                found.append(operator if len(own) == size else operator.restricted(own - first))
            first += size
        return OperatorStack(found)


def autograd_jacobian(output: Tensor, inputs: Sequence[Tensor]) -> JacobianOperator:
    """∇_x of any tensor (B, n) in the graph of the inputs (B, …); the inputs are laid side by side: d = Σ d_i."""

    def vjp_parts(u: Tensor, create_graph: bool = False) -> list[Tensor]:
        parts = torch.autograd.grad(
            output, list(inputs), u, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return [part for part in parts if part is not None]

    def vjp(u: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in vjp_parts(u)], 1)

    @functools.cache
    def probed() -> tuple[Tensor, list[Tensor]]:  # a graph of the backward pass, made if products with J are wanted
        probe = torch.zeros_like(output, requires_grad=True)
        return probe, vjp_parts(probe, create_graph=True)

    def gram(u: Tensor) -> Tensor:  # Jᵀ is linear in the probe, so its derivative there is J
        probe, images = probed()
        moved = [(image, part) for image, part in zip(images, vjp_parts(u), strict=True) if image.requires_grad]
        product = None  # behind a step function Jᵀ is 0 whatever the probe
        if moved:
            ahead, back = zip(*moved, strict=True)
            (product,) = torch.autograd.grad(ahead, probe, back, retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if product is None else product

    columns = sum(tensor[0].numel() for tensor in inputs)
    return JacobianOperator(gram, vjp, output.detach(), columns, widest=max(columns, output.shape[1]))


def chain_jacobians(chain: DenseChain) -> list[JacobianOperator]:
    """J_t of every layer of a chain that begins with x: J_1 = I, and J_{t+1} = D_t W_t J_t."""
    operators = [JacobianOperator.identity(chain.hidden[0].detach())]
    for weight, h, between in zip(chain.weights, chain.hidden[1:], chain.between, strict=False):
        with torch.no_grad():
            slope = between.pull(torch.ones_like(h))
        operators.append(operators[-1].linked(weight.detach(), slope, is_mask=between.is_mask))
    return operators


def elementwise_slope(output: Tensor, layer_output: GradientEdge) -> Tensor | None:
    """The diagonal of D = ∂output/∂z, if `output` is an elementwise function of a layer's output z; None if it cannot be."""
    ones = torch.ones_like(output)
    (diagonal,) = torch.autograd.grad(output, [layer_output], ones, retain_graph=True, allow_unused=True)
    return diagonal if diagonal is not None and diagonal.shape == output.shape else None


def chain_holds(
    first: JacobianOperator, links: Sequence[tuple[Tensor, Tensor]], outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> bool:
    """Whether every output's Jacobian is D W times the one before: products with generic vectors agree, on the data at hand.

    One backward pass gives Σ_t J_tᵀ u_t for all outputs together; the chain gives it as ((u_l D W c + u_{l−1}) D W c + …)
    J_1 with numbers c that bring what comes from behind to the size of what is added.

    Args:
        first: the Jacobian J_1 that the first weight multiplies.
        links: (W, D) of every link.
        outputs: what the links lead to, (B, n_t).
        inputs: x.
    """
    carried = torch.zeros_like(outputs[-1])
    vectors: list[Tensor] = []
    for (weight, diagonal), output in zip(reversed(links), reversed(outputs), strict=True):
        unit = _generic_like(output.detach())
        carried = ((carried + unit) * diagonal) @ weight
        size = torch.linalg.vector_norm(carried, dim=1, keepdim=True)
        factor = torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 1.0)
        carried = carried * factor
        vectors = [vector * factor for vector in (*vectors, unit)]
    expected = torch.autograd.grad(list(reversed(outputs)), list(inputs), vectors, retain_graph=True, allow_unused=True)
    return _agree(first.vjp(carried), torch.cat([part.flatten(1) for part in expected if part is not None], 1))


def is_identity(reference: JacobianOperator, columns: int) -> bool:
    """Whether J_b = I for every sample (x itself, perhaps reshaped)."""
    u = _generic_like(reference.template)
    return u.shape[1] == columns and torch.equal(reference.vjp(u), u)


def is_rounding(operator: JacobianOperator, vectors: Sequence[Tensor]) -> Tensor:
    """For which samples products with Jᵀ are rounding for the most part, seen from vectors u: (B,) bool.

    Where terms cancel (in a saturated softmax, a normalisation of two features), that is all that autograd has. Sums of u
    are then not mapped to sums of Jᵀu, or uᵀ(J Jᵀu) is not ‖Jᵀu‖². A backward pass that is no linear map is none for
    multiples of u either, and its layer is not in the sum.

    Args:
        operator: the Jacobians J_b.
        vectors: u, (B, n) each; what counts is Jᵀu.
    """
    found = torch.zeros(len(operator.template), dtype=torch.bool, device=operator.template.device)
    for u in vectors:
        tolerance = rounding_tolerance(u) / 4  # of norms, of which the bound has the squares
        image = operator.vjp(u)
        size = widest_row_sq_norm(image)
        from_gram = (torch.linalg.vecdot(widest_float(u), widest_float(operator.gram(u))) - size).abs()
        found |= from_gram > tolerance * size
        for seed in range(_SUMS):
            generic = _generic_like(u, seed)
            other = generic * (_row_norm(u) / _row_norm(generic)).unsqueeze(1).to(u.dtype)
            from_sum = _row_norm(operator.vjp(u + other) - operator.vjp(other) - image)
            found |= from_sum > tolerance * size.sqrt()
    return found


_SUMS = 8  # rounding is not to be seen from every one of them


def _row_norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(widest_float(rows), dim=1)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether all rows are equal up to rounding."""
    if found.shape != expected.shape:
        return False
    error = torch.linalg.vector_norm(found - expected, dim=1)
    return bool((error <= rounding_tolerance(expected) * torch.linalg.vector_norm(expected, dim=1)).all())


def _generic_like(template: Tensor, seed: int = 20211231) -> Tensor:
    """Vectors that no structure of a network knows of, without touching the global generators."""
    return normal_start((template.shape[0], template.shape[1]), None, template, seed)
