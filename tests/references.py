"""Slow oracles: loops over samples, over layers, over outputs. Nothing of gradpen is imported here.

A scalar f is given as a function of one sample's output row and target row; the model is run on one sample at a time
(``x[i : i + 1]``), so that no property of a batch can hide an error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RowScalar = Callable[[Tensor, Any], Tensor]  # (output row, target row) → 0-dim


# ---- one sample at a time ------------------------------------------------------------------------------------------


def rows_of(x: Any) -> int:
    """Number of samples of a tensor, a tuple or a dict of tensors."""
    first = x if isinstance(x, Tensor) else next(iter(x.values() if isinstance(x, dict) else x))
    return len(first)


def one_row(x: Any, i: int) -> Any:
    """Sample i as a batch of one; its floating-point tensors require grad."""
    if isinstance(x, dict):
        return {name: one_row(value, i) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(one_row(value, i) for value in x)
    row = x[i : i + 1]
    return row.clone().requires_grad_() if row.is_floating_point() and not row.requires_grad else row


def float_tensors(x: Any) -> list[Tensor]:
    """The tensors of an input that can be differentiated with respect to."""
    tensors = [x] if isinstance(x, Tensor) else list(x.values()) if isinstance(x, dict) else list(x)
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def call(model: nn.Module, x: Any) -> Tensor:
    """model(x), model(*x) or model(**x)."""
    return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)


def sample_scalars(model: nn.Module, x: Any, y: Any, scalar: RowScalar) -> Iterator[tuple[Any, Tensor]]:
    """(x_i, f_i) for one sample after the other."""
    for i in range(rows_of(x)):
        row = one_row(x, i)
        yield row, scalar(call(model, row)[0], None if y is None else y[i])


def gradients(f: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """∂f/∂tensor with its own graph, and zeros where f does not depend on it."""
    if not tensors or not f.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    found = torch.autograd.grad(f, tensors, create_graph=True, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def sq_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all entries."""
    return sum((tensor.square().sum() for tensor in tensors), torch.zeros((), dtype=torch.float64))


def scalar_sq(f: Tensor, tensors: Sequence[Tensor]) -> float:
    """‖∂f/∂tensors‖² as a number."""
    return sq_norm(gradients(f, tensors)).item()


# ---- penalties -----------------------------------------------------------------------------------------------------


def trainable(model: nn.Module) -> list[Tensor]:
    """The parameters that require grad, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def input_grad_sq_norm(model: nn.Module, x: Any, y: Any, scalar: RowScalar) -> Tensor:
    """‖∇_x f_i‖² over all floating-point inputs: (B,)."""
    return torch.stack([sq_norm(gradients(f, float_tensors(row))) for row, f in sample_scalars(model, x, y, scalar)])


def output_jacobian_sq_norm(model: nn.Module, x: Tensor) -> Tensor:
    """‖∂F/∂x_i‖_F² from the whole Jacobian: (B,)."""
    jacobians = [
        torch.autograd.functional.jacobian(lambda row: call(model, row), x[i : i + 1], create_graph=True)
        for i in range(len(x))
    ]
    return torch.stack([jacobian.square().sum() for jacobian in jacobians])


def param_grad_sq_norm(
    model: nn.Module,
    x: Any,
    y: Any,
    scalar: RowScalar,
    *,
    group: int = 1,
    parameters: Sequence[Tensor] | None = None,
) -> Tensor:
    """‖∇_θ mean f_i‖² over consecutive groups of samples, the last one perhaps smaller: (groups,)."""
    parameters = trainable(model) if parameters is None else parameters
    per_sample = [gradients(f, parameters) for _, f in sample_scalars(model, x, y, scalar)]
    groups = [per_sample[start : start + group] for start in range(0, len(per_sample), group)]
    return torch.stack([sq_norm([sum(g) / len(members) for g in zip(*members, strict=True)]) for members in groups])


def flat_gradient(value: Tensor, model: nn.Module) -> Tensor:
    """∂value/∂θ over all trainable parameters as one vector."""
    return torch.cat([g.reshape(-1) for g in gradients(value, trainable(model))]).detach()


def finite_difference_gradient(value: Callable[[], Tensor], model: nn.Module, step: float = 1e-5) -> Tensor:
    """∂value()/∂θ by central differences, entry by entry."""
    differences = []
    for parameter in trainable(model):
        entries = parameter.detach().view(-1)
        for k in range(len(entries)):
            original = entries[k].item()
            entries[k] = original + step
            above = value().item()
            entries[k] = original - step
            below = value().item()
            entries[k] = original
            differences.append((above - below) / (2 * step))
    return torch.tensor(differences, dtype=torch.float64)


def sam_gradient(model: nn.Module, loss: Callable[[nn.Module], Tensor], radius: float) -> Tensor:
    """∇L at θ + radius · ∇L/‖∇L‖ (Foret et al. 2021, eq. 2 and 3), as one vector."""
    climbed = copy.deepcopy(model)
    gradient = gradients(loss(climbed), trainable(climbed))
    norm = math.sqrt(sq_norm(gradient).item())
    with torch.no_grad():
        for parameter, g in zip(trainable(climbed), gradient, strict=True):
            parameter += radius / norm * g
    return flat_gradient(loss(climbed), climbed)


# ---- the inequality ------------------------------------------------------------------------------------------------


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value, from all of them."""
    return float(torch.linalg.svdvals(matrix.detach())[0])


def prefix_jacobian(modules: Sequence[nn.Module], row: Tensor) -> Tensor:
    """∂h/∂x of a chain of modules at a batch of one, as a matrix (width of h, size of x)."""

    def prefix(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x.reshape(-1)

    return torch.autograd.functional.jacobian(prefix, row.detach()).reshape(-1, row.numel())


def denominator(weight: Tensor, jacobian: Tensor, norm: str) -> float:
    """(‖W‖ ‖J‖)² in the norm asked for."""
    if norm == "joint":
        return spectral_norm(weight @ jacobian) ** 2
    if norm == "frobenius":
        return float(weight.detach().norm() ** 2 * jacobian.norm() ** 2)
    return (spectral_norm(weight) * spectral_norm(jacobian)) ** 2


def inequality(
    model: nn.Sequential, x: Tensor, y: Any, scalar: RowScalar | None, norm: str = "spectral"
) -> dict[str, Any]:
    """Both sides of the inequality for a chain of modules, layer by layer and sample by sample.

    Every `nn.Linear` of the chain counts as a layer of the sum. scalar=None stands for the sum over all outputs.
    Returns {"lhs", "rhs", "input", "layers": {name: {"weight_lhs", "weight_rhs", "bias_lhs", "bias_rhs", …}}}, with
    (B,) values and None for the terms of frozen or absent parameters.
    """
    dense = {name: module for name, module in model.named_children() if isinstance(module, nn.Linear)}
    layers: dict[str, dict[str, Any]] = {name: {} for name in dense}
    sides: dict[str, list[float]] = {"lhs": [], "rhs": [], "input": []}
    for i in range(len(x)):
        row = one_row(x, i)
        h, seen = row, {}
        for name, module in model.named_children():
            z = module(h)
            seen[name] = (h, z)
            h = z.clone()  # an in-place activation must not change z
        outputs = list(h[0]) if scalar is None else [scalar(h[0], None if y is None else y[i])]
        input_sq = sum(scalar_sq(f, [row]) for f in outputs)
        rhs = sum(scalar_sq(f, trainable(model)) for f in outputs)
        lhs = 0.0
        for position, (name, module) in enumerate(model.named_children()):
            if name not in dense:
                continue
            h_in, z_out = seen[name]
            jacobian = prefix_jacobian(list(model)[:position], row)
            delta_sq = sum(scalar_sq(f, [z_out]) for f in outputs)
            h_sq = float(h_in.detach().square().sum())
            bottom = denominator(module.weight, jacobian, norm)
            scale = 0.0 if bottom == 0 else input_sq / bottom
            product = spectral_norm(module.weight @ jacobian)
            has_weight = module.weight.requires_grad
            has_bias = module.bias is not None and module.bias.requires_grad
            terms = {
                "weight_lhs": scale * h_sq if has_weight else None,
                "weight_rhs": delta_sq * h_sq if has_weight else None,
                "bias_lhs": scale if has_bias else None,
                "bias_rhs": delta_sq if has_bias else None,
                "input_sq_norm": h_sq,
                "jacobian_norm": spectral_norm(jacobian),
                "slack_product": spectral_norm(module.weight) * spectral_norm(jacobian) / product if product else None,
                "slack_alignment": product * math.sqrt(delta_sq / input_sq) if input_sq else None,
            }
            for key, value in terms.items():
                layers[name].setdefault(key, []).append(value)
            lhs += (terms["weight_lhs"] or 0.0) + (terms["bias_lhs"] or 0.0)
        for key, value in (("lhs", lhs), ("rhs", rhs), ("input", input_sq)):
            sides[key].append(value)
    as_tensor = {key: torch.tensor(values, dtype=torch.float64) for key, values in sides.items()}
    tensors = {
        name: {
            key: None if None in values else torch.tensor(values, dtype=torch.float64) for key, values in terms.items()
        }
        for name, terms in layers.items()
    }
    return {**as_tensor, "layers": tensors}


# ---- comparisons ---------------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ (and the plain distance where expected is 0)."""
    distance = (actual.detach().double() - expected.detach().double()).norm()
    return float(distance / (expected.detach().double().norm() or 1.0))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Same shape and, entry by entry, within `tolerance` of the largest entry."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=tolerance, atol=tolerance * largest
    )


def check(
    actual: Tensor, expected: Tensor, model: nn.Module, tolerance: float = 1e-10, exact_model: nn.Module | None = None
) -> None:
    """Values (B,), and the gradient of their mean in the parameters of the models that they are of."""
    assert_close(actual, expected, tolerance)
    gradient = flat_gradient(actual.mean(), model)
    assert relative_error(gradient, flat_gradient(expected.mean(), exact_model or model)) < tolerance
