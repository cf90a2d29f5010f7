"""Evaluation of both sides of the inequality on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpen import _checks
from gradpen._checks import NotFiniteError as NotFiniteError
from gradpen._numerics import divide_or_zero, rounding_tolerance, widest_row_sq_norm
from gradpen.chain_terms import chain_of
from gradpen.cut_layers import CutLayer, cotangents_of_input, layers_in_sum
from gradpen.dense_chain import DenseChain
from gradpen.isolation import outside_inference, unrounded_float32, untouched
from gradpen.jacobians import is_rounding
from gradpen.layer_norms import (
    METHODS,
    NORMS,
    LayerNorms,
    NormSettings,
    default_budget,
    jacobian_operators,
    layer_norms,
)
from gradpen.recording import Recording, record_forward
from gradpen.report import ExcludedLayer, InequalityReport, LayerTerms, ratio_or_nan
from gradpen.sides import Sides, both_sides, output_cotangents
from gradpen.terms import select_parameters


def evaluate_inequality(
    model: nn.Module,
    x: Any,
    y: Any = None,
    *,
    criterion: Callable[..., Tensor] = F.cross_entropy,
    of: str | Callable[[Any, Any], Tensor] = "loss",
    norm: str = "spectral",
    method: str = "auto",
    delta: float = 1e-6,
    rtol: float = 0.05,
    slack: bool = True,
    memory_budget: int | None = None,
) -> InequalityReport:
    r"""Both sides of the inequality between input and parameter gradients, sample by sample.

    .. math:: \|\nabla_x f\|^2 \sum_t \frac{1 + \|h_t\|^2}{\|W_t\|^2 \|\nabla_x h_t\|^2} \le \|\nabla_\theta f\|^2

    A dense layer t is in the sum if all of x's influence on f passes through it, once. In a chain of dense layers and
    elementwise functions all are; elsewhere :math:`\nabla_x f = (W_t J_t)^\top \delta_t` is checked on the data at hand. The
    model is evaluated in the mode it is in and left without a trace: flags, buffers, ``.grad``, hooks and random streams are
    as before.

    Args:
        model: maps x of shape (B, …) to a tensor of shape (B, …); float32 or float64. Compiled modules are evaluated
            eagerly.
        x: floating-point input (B, …), or a tuple or dict with at least one.
        y: target, what `criterion` takes; not needed for ``of="output"``.
        criterion: gives f_i for ``of="loss"``.
        of: "loss", "output" (both sides summed over the outputs: :math:`\|J_F\|_F^2` on the left), or a callable
            (output, target) → (B,), a logit or a margin.
        norm: "spectral"; "frobenius" (looser); "joint" (:math:`\|W_t J_t\|_2`, tighter). The first and the last are
            computed as brackets.
        method: "dense" (explicit Jacobians and their singular values), "krylov" (Lanczos, matrix-free) or "auto".
        delta: probability that any upper end of a Krylov bracket in the whole report fails.
        rtol: width of the Krylov brackets relative to their upper ends.
        slack: compute also the norms that `norm` does without, ‖W_t J_t‖ or else ‖W_t‖ and ‖J_t‖, and from them the two
            factors of each layer's slack (with "frobenius" the second one alone). These are estimates: no bound rests on
            them, and brackets of ‖W_t J_t‖ that are made for them alone fail with probability 1e-2 each.
        memory_budget: bytes that the norms may take beside the graph of the forward pass, for the vectors of an iteration
            or explicit Jacobians; samples are taken in parts that fit. By default 64 MiB on the CPU, and 1 GiB on a GPU,
            which small parts would leave idle, or a quarter of what is free if that is less. (A prefix of the model that is
            no chain of dense layers and elementwise activations is iterated for all samples at once, whatever the budget.)

    Returns:
        An `InequalityReport` with tensors of shape (B,), float64 where the device has it.

    Raises:
        TypeError: if there is no floating-point input, or the model does not return one tensor.
        ValueError: on an unknown option, a parameter type other than float32 and float64, autocast within the model, a
            frozen model, or NaN.
        RuntimeError: if a BatchNorm layer in training mode (named) or anything else mixes the samples.

    Example:
        >>> import torch
        >>> from gradpen import evaluate_inequality
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> report = evaluate_inequality(model, torch.randn(5, 4), torch.randint(3, (5,)))
        >>> bool(report.holds.all()), [layer.name for layer in report.layers]
        (True, ['0', '2'])

    Source:
        Su, "An inequality between the input gradient penalty and the parameter gradient penalty" (2021,
        kexue.fm/archives/8796), after Dherin, Munn and Barrett, "The geometric Occam's razor implicit in deep
        learning" (2021, arXiv 2111.15090).
    """
    _checks.check_model(model)
    check_options(of, norm, delta, rtol)
    _checks.check_choice("method", method, METHODS)
    if memory_budget is not None:
        _checks.check_positive_int("memory_budget", memory_budget)
    _checks.check_no_batch_statistics(model, "the inequality")
    model = _original_module(model)
    parameters = select_parameters(model, None)
    _check_precision(parameters)
    name = of if isinstance(of, str) else getattr(of, "__name__", "callable")
    with unrounded_float32(), untouched(model) as rng:
        x, y = outside_inference(x), outside_inference(y)
        recording = record_forward(model, x, input_grad=True, calls=True)
        cotangents = output_cotangents(recording.output, y, of, criterion)
        _checks.check_input_rows(recording.inputs, recording.output.shape[0])
        _check_finite(recording.output, *cotangents.directions)
        sides = both_sides(model, x, recording, cotangents, parameters, rng)
        budget = default_budget(recording.output.device) if memory_budget is None else memory_budget
        settings = NormSettings(norm, method, delta, rtol, slack, budget)
        with recording.gate.towards_inputs():
            chain = None if recording.is_hooked else chain_of(recording)
            report = _report(model, recording, sides, parameters, chain, settings, name)
            if chain is not None and not bool(report.holds.all()):  # a hook on one of its nodes, which nobody can see
                report = _report(model, recording, sides, parameters, None, settings, name)
        return report


def check_options(of: object, norm: str, delta: float, rtol: float) -> None:
    """Those that others take, too, and hand on later.

    Raises:
        ValueError: if `evaluate_inequality` would refuse them.
    """
    if not callable(of):
        _checks.check_choice("of", of, ("loss", "output"))
    _checks.check_choice("norm", norm, NORMS)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be a probability between 0 and 1, got {delta}")
    _checks.check_positive("rtol", rtol)


def _report(
    model: nn.Module,
    recording: Recording,
    sides: Sides,
    parameters: Mapping[str, Tensor],
    chain: DenseChain | None,
    settings: NormSettings,
    name: str,
) -> InequalityReport:
    """With layers and Jacobians as a chain tells them, or, without one, as they are found out.

    Where Jacobians are found out, a layer counts 0 for samples whose left side is too large and whose products with them are
    rounding: terms are never negative, so that what is left of the sum is a bound, too.
    """
    layers, excluded = layers_in_sum(model, recording, sides, parameters, chain)
    operators = jacobian_operators(recording, layers, chain)
    norms = layer_norms(layers, operators, settings)
    report = _assemble(layers, excluded, norms, sides, settings, name)
    too_large = report.lhs > report.rhs * (1 + _allowance(layers))
    if chain is not None or not bool(too_large.any()):
        return report
    counted = [
        found.without(too_large & is_rounding(operator, cotangents_of_input(layer, sides)))
        for layer, operator, found in zip(layers, operators, norms, strict=True)
    ]
    return _assemble(layers, excluded, counted, sides, settings, name)


def _assemble(
    layers: Sequence[CutLayer],
    excluded: list[ExcludedLayer],
    norms: Sequence[LayerNorms],
    sides: Sides,
    settings: NormSettings,
    of: str,
) -> InequalityReport:
    sizes = [widest_row_sq_norm(layer.call.input.detach()) for layer in layers]
    each = list(zip(layers, norms, sizes, strict=True))
    terms = [_layer_terms(layer, found, size, sides, settings) for layer, found, size in each]
    zeros = torch.zeros_like(sides.input_sq_norm)
    lowest = [_coefficient(layer, found.denominator.upper, size) for layer, found, size in each]
    lhs_lower = sides.input_sq_norm * sum(lowest, zeros)
    lhs_upper = sides.input_sq_norm * sum([term.coefficient for term in terms], zeros)
    violated = lhs_lower > sides.param_sq_norm * (1 + _allowance(layers))
    return InequalityReport(
        lhs=lhs_upper,  # Ritz values are accurate to many more digits than the bracket is narrow
        rhs=sides.param_sq_norm,
        lhs_lower=lhs_lower,
        lhs_upper=lhs_upper,
        holds=~(violated & lhs_lower.isfinite()),  # what overflowed says nothing
        input_grad_sq_norm=sides.input_sq_norm,
        param_grad_sq_norm=sides.param_sq_norm,
        batch_grad_sq_norm=sides.batch_sq_norm,
        layers=terms,
        excluded=excluded,
        of=of,
        norm=settings.norm,
        delta=settings.delta,
    )


def _allowance(layers: Sequence[CutLayer]) -> float:
    """By how much, relative to the right side, rounding may make the left side too large."""
    return rounding_tolerance(layers[0].weight) if layers else 0.0


def _layer_terms(
    layer: CutLayer, norms: LayerNorms, h_sq_norm: Tensor, sides: Sides, settings: NormSettings
) -> LayerTerms:
    inverse = divide_or_zero(torch.ones_like(h_sq_norm), norms.denominator.lower**2)
    product = None if norms.product is None else norms.product.lower
    slack_product = slack_alignment = None
    if product is not None and settings.slack:
        if norms.weight is not None and norms.jacobian is not None and settings.norm != "frobenius":
            slack_product = ratio_or_nan(norms.weight.lower * norms.jacobian.lower, product)
        slack_alignment = ratio_or_nan(product * layer.delta_sq_norms.sqrt(), sides.input_sq_norm.sqrt())
    return LayerTerms(
        name=layer.name,
        weight_lhs=sides.input_sq_norm * h_sq_norm * inverse if layer.counts_weight else None,
        weight_rhs=layer.delta_sq_norms * h_sq_norm if layer.counts_weight else None,
        bias_lhs=sides.input_sq_norm * inverse if layer.counts_bias else None,
        bias_rhs=layer.delta_sq_norms if layer.counts_bias else None,
        coefficient=_coefficient(layer, norms.denominator.lower, h_sq_norm),
        input_sq_norm=h_sq_norm,
        weight_norm=None if norms.weight is None else norms.weight.lower,
        jacobian_norm=None if norms.jacobian is None else norms.jacobian.lower,
        jacobian_norm_upper=None if norms.jacobian is None else norms.jacobian.upper,
        product_norm=product,
        slack_product=slack_product,
        slack_alignment=slack_alignment,
    )


def _coefficient(layer: CutLayer, denominator: Tensor, h_sq_norm: Tensor) -> Tensor:
    """(1 + ‖h‖²)/(‖W‖²‖J‖²) with the terms that count; 0 for a dead layer: (B,)."""
    counted = h_sq_norm * layer.counts_weight + float(layer.counts_bias)
    return divide_or_zero(counted, denominator**2)


def _original_module(model: nn.Module) -> nn.Module:
    """The module behind torch.compile and data-parallel wrappers, which has the same parameters."""
    for attribute, wrapper in (("_orig_mod", "OptimizedModule"), ("module", "DistributedDataParallel")):
        if type(model).__name__ == wrapper:
            return _original_module(getattr(model, attribute))
    return model


def _check_finite(output: Tensor, *directions: Tensor) -> None:
    finite = torch.stack([tensor.isfinite().reshape(len(output), -1).all(1) for tensor in (output, *directions)])
    samples = (~finite.all(0)).nonzero().flatten().tolist()
    if samples:
        raise NotFiniteError(
            f"expected finite outputs and gradients, got NaN or infinity for {len(samples)} of {len(output)} samples, the "
            f"first of them sample {samples[0]}: leave them out, or see whether the training has diverged"
        )


def _check_precision(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"expected float32 or float64 parameters, got {parameter.dtype} in {name!r}: norms in a denominator "
                "need the precision; evaluate a copy, copy.deepcopy(model).float()"
            )
    types = {parameter.dtype: name for name, parameter in parameters.items()}
    if len(types) > 1:
        came = " and ".join(f"{dtype} in {name!r}" for dtype, name in types.items())
        raise ValueError(f"expected parameters of one type, got {came}: evaluate a copy, copy.deepcopy(model).double()")
