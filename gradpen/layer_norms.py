"""‖W_t‖, ‖J_t‖ and ‖W_t J_t‖ of the layers in the sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gradpen import jacobians, spectral
from gradpen._numerics import widest_float
from gradpen.cut_layers import CutLayer
from gradpen.recording import Recording
from gradpen.spectral import Bracket

NORMS = ("spectral", "frobenius", "joint")
METHODS = ("auto", "dense", "krylov")


@dataclass(frozen=True)
class NormSettings:
    """Arguments of `gradpen.evaluate_inequality` that concern norms."""

    norm: str
    method: str
    delta: float
    rtol: float
    slack: bool


@dataclass(frozen=True)
class LayerNorms:
    """Norms of one layer; `weight` is 0-dim, the others are (B,)."""

    denominator: Bracket  # ‖W‖‖J‖, or ‖W J‖ for the joint norm
    weight: Bracket | None
    jacobian: Bracket | None
    product: Bracket | None  # ‖W J‖


def jacobian_operators(recording: Recording, layers: Sequence[CutLayer]) -> list[jacobians.JacobianOperator]:
    """J_t for every layer in the sum; a chain of dense layers and elementwise activations is multiplied out."""
    columns = sum(tensor[0].numel() for tensor in recording.inputs)
    operators: list[jacobians.JacobianOperator] = []
    for position, layer in enumerate(layers):
        h = layer.call.checked_input()
        reference = jacobians.autograd_jacobian(h, recording.inputs)
        chained = None
        if position > 0:
            before = layers[position - 1]
            chained = jacobians.chained_jacobian(h, operators[-1], before.call.output, before.weight, reference)
        elif jacobians.is_identity(reference, columns):
            chained = jacobians.JacobianOperator.identity(h.detach())
        operators.append(reference if chained is None else chained)
    return operators


def layer_norms(
    layers: Sequence[CutLayer], operators: Sequence[jacobians.JacobianOperator], settings: NormSettings
) -> list[LayerNorms]:
    """All norms that the settings ask for; the failure probability is shared by all brackets."""
    batch_size = len(layers[0].call.input) if layers else 0
    brackets = max(
        3 * len(layers) * batch_size, 1
    )  # ‖J‖, ‖W J‖ and, once for all samples, ‖W‖: a sample's share is fixed
    delta = settings.delta / brackets
    return [_norms(layer, operator, settings, delta) for layer, operator in zip(layers, operators, strict=True)]


def _norms(layer: CutLayer, operator: jacobians.JacobianOperator, settings: NormSettings, delta: float) -> LayerNorms:
    product = None
    if settings.norm == "joint" or settings.slack:
        product = _operator_norm(operator.times_weight(layer.weight), settings, delta)
    if product is not None and settings.norm == "joint" and not settings.slack:
        return LayerNorms(product, None, None, product)
    if settings.norm == "frobenius":
        weight = spectral.exact_bracket(widest_float(layer.weight).square().sum().sqrt())
        jacobian = spectral.exact_bracket(operator.sq_frobenius_norm().sqrt())
    else:
        weight = _matrix_norm(layer.weight, settings, delta)
        jacobian = _operator_norm(operator, settings, delta)
    apart = Bracket(weight.lower * jacobian.lower, weight.upper * jacobian.upper)
    denominator = apart if product is None or settings.norm != "joint" else product
    return LayerNorms(denominator, weight, jacobian, product)


def _operator_norm(operator: jacobians.JacobianOperator, settings: NormSettings, delta: float) -> Bracket:
    """‖J_b‖₂ for every sample: (B,)."""
    template = operator.template
    batch_size, rows = template.shape
    if operator.is_identity:
        return spectral.exact_bracket(template.new_ones(batch_size))
    if operator.shared is not None:
        norm = _matrix_norm(operator.shared, settings, delta)
        return Bracket(norm.lower.expand(batch_size), norm.upper.expand(batch_size))
    if settings.method == "dense" or (settings.method == "auto" and rows <= _DENSE_ROWS):
        return spectral.dense_bracket(operator.materialize())
    shared = spectral.normal_start((1, rows), None, template, seed=0)  # a sample's norm depends on no other sample
    start = shared.expand_as(template) if operator.support is None else shared * operator.support
    return spectral.lanczos_bracket(operator.gram, start, delta=delta, rtol=settings.rtol)


def _matrix_norm(weight: Tensor, settings: NormSettings, delta: float) -> Bracket:
    """‖W‖₂: 0-dim."""
    if settings.method == "dense" or (settings.method == "auto" and min(weight.shape) <= _DENSE_WEIGHT):
        return spectral.dense_bracket(weight)
    start = spectral.normal_start((1, weight.shape[0]), None, weight, seed=1)
    bracket = spectral.lanczos_bracket(lambda u: (u @ weight) @ weight.T, start, delta=delta, rtol=settings.rtol)
    return Bracket(bracket.lower[0], bracket.upper[0])


# Below these sizes explicit singular values cost less than the Lanczos steps that they would replace.
_DENSE_ROWS = 16
_DENSE_WEIGHT = 64
