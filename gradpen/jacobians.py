"""J_t = ∇_x h_t of every sample as an operator: products with it, never (unless asked for) the matrices.

Two kinds share one interface. Any differentiable prefix of the model goes through autograd: Jᵀu is a backward pass, J v the
backward pass of a backward pass. A chain of dense layers and elementwise activations multiplies by the weights themselves,
and shares W_1 W_1ᵀ over all samples, so the input width never enters an iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradpen._numerics import rounding_tolerance, row_sq_norm, sum_tensors, widest_float
from gradpen.spectral import normal_start

MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class JacobianOperator:
    """The Jacobians J_b (n × d), one for every sample b.

    Attributes:
        gram: (B, n) → (B, n), u ↦ J Jᵀ u.
        vjp: (B, n) → (B, d), u ↦ Jᵀ u.
        template: (B, n), a tensor of the right shape, type and device.
        support: (B, n), False where a row of J_b is known to be 0; None if nothing is known.
        shared: the one matrix that J_b is for every sample (the first dense layer's weight); None otherwise.
        is_identity: J_b = I for every sample (the input itself).
    """

    gram: MatVec
    vjp: MatVec
    template: Tensor
    support: Tensor | None = None
    shared: Tensor | None = None
    is_identity: bool = False

    @classmethod
    def identity(cls, template: Tensor) -> JacobianOperator:
        """J_1 = I."""
        return cls(lambda u: u, lambda u: u, template, is_identity=True)

    def times_weight(self, weight: Tensor) -> JacobianOperator:
        """W J for a weight (m, n)."""
        template = self.template.new_empty(self.template.shape[0], weight.shape[0])
        if self.is_identity:
            gram_matrix = weight @ weight.T
            return JacobianOperator(lambda u: u @ gram_matrix, lambda u: u @ weight, template, shared=weight)
        return JacobianOperator(lambda u: self.gram(u @ weight) @ weight.T, lambda u: self.vjp(u @ weight), template)

    def times_diagonal(self, diagonal: Tensor) -> JacobianOperator:
        """D J for diagonals (B, n)."""
        return JacobianOperator(
            lambda u: diagonal * self.gram(diagonal * u),
            lambda u: self.vjp(diagonal * u),
            self.template,
            support=diagonal != 0,
        )

    def materialize(self) -> Tensor:
        """J itself, one row at a time: (B, n, d)."""
        return torch.stack([self.vjp(unit) for unit in self._units()], 1)

    def sq_frobenius_norm(self) -> Tensor:
        """‖J_b‖_F², one row of J at a time: (B,)."""
        return sum_tensors([row_sq_norm(widest_float(self.vjp(unit))) for unit in self._units()])

    def _units(self) -> Iterator[Tensor]:
        for row in range(self.template.shape[1]):
            unit = torch.zeros_like(self.template)
            unit[:, row] = 1
            yield unit


def autograd_jacobian(output: Tensor, inputs: Sequence[Tensor]) -> JacobianOperator:
    """∇_x of any tensor (B, n) in the graph of the inputs (B, …); the inputs are laid side by side: d = Σ d_i."""
    probe = torch.zeros_like(output, requires_grad=True)
    images = torch.autograd.grad(output, list(inputs), probe, create_graph=True, allow_unused=True)
    used = [(tensor, image) for tensor, image in zip(inputs, images, strict=True) if image is not None]

    def vjp_parts(u: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(output, [tensor for tensor, _ in used], u, retain_graph=True))

    def vjp(u: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in vjp_parts(u)], 1)

    def gram(u: Tensor) -> Tensor:  # Jᵀ is linear in the probe, so its derivative there is J
        return torch.autograd.grad([image for _, image in used], probe, vjp_parts(u), retain_graph=True)[0]

    return JacobianOperator(gram, vjp, output.detach())


def chained_jacobian(
    output: Tensor,
    before: JacobianOperator,
    layer_output: GradientEdge,
    weight: Tensor,
    reference: JacobianOperator,
) -> JacobianOperator | None:
    """D W J_before, if `output` is an elementwise function of the layer's output and of nothing else that x reaches.

    Proved on the data at hand: products with generic vectors equal those of `reference`, the autograd Jacobian. Returns
    None where they do not.
    """
    ones = torch.ones_like(output)
    (diagonal,) = torch.autograd.grad(output, [layer_output], ones, retain_graph=True, allow_unused=True)
    if diagonal is None or diagonal.shape != output.shape:
        return None
    chained = before.times_weight(weight).times_diagonal(diagonal)
    return chained if _agree(chained, reference) else None


def is_identity(reference: JacobianOperator, columns: int) -> bool:
    """Whether J_b = I for every sample (x itself, perhaps reshaped)."""
    u = _generic_like(reference.template)
    return u.shape[1] == columns and torch.equal(reference.vjp(u), u)


def _agree(candidate: JacobianOperator, reference: JacobianOperator) -> bool:
    u = _generic_like(reference.template)
    expected = reference.vjp(u)
    error = torch.linalg.vector_norm(candidate.vjp(u) - expected, dim=1)
    tolerance = rounding_tolerance(expected)
    return bool((error <= tolerance * torch.linalg.vector_norm(expected, dim=1)).all())


def _generic_like(template: Tensor) -> Tensor:
    """Vectors that no structure of a network knows of, without touching the global generators."""
    return normal_start((template.shape[0], template.shape[1]), None, template, seed=20211231)
