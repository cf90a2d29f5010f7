"""R_x and R_θ before the mean: squared gradient norms, one per sample or per group of samples, differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpen.criteria import as_criterion
from gradpen.evaluation import evaluate_terms
from gradpen.terms import InputTerm, ParameterFilter, ParamTerm

__all__ = ["input_grad_sq_norm", "param_grad_sq_norm"]


def input_grad_sq_norm(
    model: nn.Module,
    x: Any,
    y: Any = None,
    *,
    criterion: Callable[..., Tensor] = F.cross_entropy,
    of: str | Callable[[Any, Any], Tensor] = "loss",
    method: str = "exact",
    num_projections: int = 1,
    scheme: str = "forward",
    step: float = 0.01,
    generator: torch.Generator | None = None,
    create_graph: bool = True,
) -> Tensor:
    r"""Squared norm of the input gradient of every sample, differentiable.

    .. math:: q_i = \|\nabla_x f_i\|^2, \qquad \text{or, for } of="output", \quad q_i = \|J_i\|_F^2

    Args:
        model: maps x of shape (B, …) to an output with one row per sample.
        x: floating-point input of any rank (B, …), or a tuple (``model(*x)``) or dict (``model(**x)``) with at least one;
            the squared norms of several inputs add up.
        y: target, what `criterion` takes; not needed for ``of="output"``.
        criterion: gives f_i for ``of="loss"``: a function or module with a ``reduction`` argument, or a callable that
            returns (B,).
        of: "loss", "output" (all outputs: the squared Frobenius norm of the Jacobian), or a callable
            (output, target) → (B,).
        method: "exact" (double backpropagation), "projection" (random output directions, unbiased, for
            ``of="output"``) or "finite_difference" (value exact, gradient from first derivatives).
        num_projections: output directions per sample for "projection".
        scheme: "forward", "backward" or "central" difference.
        step: length of the displacement of x for "finite_difference", in units of x.
        generator: where "projection" draws from; default is torch's global generator.
        create_graph: keep the result differentiable; False is cheaper where only the values are wanted.

    Returns:
        q of shape (B,), float32 at least.

    Raises:
        TypeError: if no input is a floating-point tensor.
        ValueError: on an unknown option, or if batch sizes do not match.
        RuntimeError: under ``torch.no_grad()``, with BatchNorm in training mode, with a compiled module under
            "exact" or "projection", or if samples are mixed.

    Example:
        >>> import torch
        >>> from gradpen.functional import input_grad_sq_norm
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> q = input_grad_sq_norm(model, torch.randn(3, 4), of=lambda output, target: output[:, 0])
        >>> torch.allclose(q, model.weight.square().sum())
        True

    Source:
        Drucker and LeCun, "Improving generalization performance using double backpropagation" (1992); for
        ``of="output"`` Hoffman, Roberts and Yaida, "Robust learning with Jacobian regularization" (2019, arXiv
        1908.02729).
    """
    term = InputTerm(of, method, num_projections, scheme, step, generator)
    terms = [(term, as_criterion(criterion))]
    return evaluate_terms(model, x, y, terms, create_graph=create_graph).norms[0].sq_norms


def param_grad_sq_norm(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    criterion: Callable[..., Tensor] = F.cross_entropy,
    over: str | int = "sample",
    method: str = "exact",
    scheme: str = "forward",
    step: float = 0.01,
    parameters: ParameterFilter | None = None,
    create_graph: bool = True,
) -> Tensor:
    r"""Squared norm of the parameter gradient of every sample or group of samples, differentiable.

    .. math:: q_i = \|\nabla_\theta f_i\|^2 = \sum_t (1 + \|h_t\|^2) \|\delta_t\|^2 \quad \text{(dense layers)}

    ``over="sample"`` needs no per-sample parameter gradient for ``nn.Linear``, ``nn.Conv1d/2d``, ``nn.Embedding``,
    ``nn.LayerNorm`` and ``nn.GroupNorm`` (and the functions behind them); other parameters go through ``torch.func``.

    Args:
        model: maps x of shape (B, …) to an output with one row per sample.
        x: a tensor (B, …), a tuple or a dict of tensors, integer or floating-point.
        y: target, what `criterion` takes.
        criterion: gives f_i: a function or module with a ``reduction`` argument, or a callable that returns (B,).
        over: "sample"; "batch" for :math:`\|\nabla_\theta \frac1B \sum_i f_i\|^2`; or an int, the size of
            micro-batches of consecutive samples (the last one may be smaller).
        method: "exact", or "finite_difference" (value exact, gradient from first derivatives; samples and
            micro-batches one after the other).
        scheme: "forward", "backward" or "central" difference.
        step: length r of the displacement of θ for "finite_difference": :math:`\varepsilon = r / \|\nabla_\theta L\|`.
        parameters: which count: a callable (name, parameter) → bool, or glob patterns such as ``["*.weight"]``; default
            all that require grad.
        create_graph: keep the result differentiable; False is cheaper where only the values are wanted.

    Returns:
        q of shape (B,) for "sample", (⌈B/m⌉,) for micro-batches of m, (1,) for "batch"; float32 at least.

    Raises:
        ValueError: on an unknown option, if no parameter is selected, or if batch sizes do not match.
        RuntimeError: under ``torch.no_grad()``, with a compiled module under "exact", with BatchNorm in training
            mode unless ``over="batch"``.

    Example:
        >>> import torch
        >>> from gradpen.functional import param_grad_sq_norm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.randint(3, (5,))
        >>> param_grad_sq_norm(model, x, y).shape
        torch.Size([5])

    Source:
        Goodfellow, "Efficient per-example gradient computations" (2015, arXiv 1510.01799) for the dense layer; Barrett
        and Dherin, "Implicit gradient regularization" (2021, arXiv 2009.11162) for ``over="batch"``.
    """
    term = ParamTerm(over, method, scheme, step, parameters)
    terms = [(term, as_criterion(criterion))]
    return evaluate_terms(model, x, y, terms, create_graph=create_graph).norms[0].sq_norms
