"""‖W_t‖, ‖J_t‖ and ‖W_t J_t‖ of the layers in the sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
    memory_budget: int


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
    """All norms that the settings ask for; the failure probability is shared by the brackets that may fail."""
    joint_alone = settings.norm == "joint" and not settings.slack
    weights = [
        layer.weight
        for layer, operator in zip(layers, operators, strict=True)
        if not joint_alone or operator.is_identity
    ]
    certified = sum(_is_iterated_weight(weight, settings) for weight in weights)
    for layer, operator in zip(layers, operators, strict=True):
        certified += len(operator.template) * (not joint_alone and _is_iterated(operator.template.shape[1], settings))
        certified += len(operator.template) * (settings.norm == "joint" and _is_iterated(len(layer.weight), settings))
    delta = settings.delta / max(certified, 1)
    weight_norms = iter(_weight_norms(weights, settings, delta))
    return [
        _norms(layer, operator, None if joint_alone and not operator.is_identity else next(weight_norms), settings, delta)
        for layer, operator in zip(layers, operators, strict=True)
    ]


def _norms(
    layer: CutLayer,
    operator: jacobians.JacobianOperator,
    weight: Bracket | None,
    settings: NormSettings,
    delta: float,
) -> LayerNorms:
    product = None
    if settings.norm == "joint" or settings.slack:
        product = _product_norm(layer, operator, weight, settings, delta)
    if product is not None and settings.norm == "joint" and not settings.slack:
        return LayerNorms(product, None, None, product)
    assert weight is not None
    if settings.norm == "frobenius":
        weight = spectral.exact_bracket(widest_float(layer.weight).square().sum().sqrt())
        jacobian = spectral.exact_bracket(operator.sq_frobenius_norm().sqrt())
    else:
        jacobian = _operator_norm(operator, settings, delta)
    apart = Bracket(weight.lower * jacobian.lower, weight.upper * jacobian.upper)
    denominator = apart if product is None or settings.norm != "joint" else product
    return LayerNorms(denominator, weight, jacobian, product)


def _product_norm(
    layer: CutLayer,
    operator: jacobians.JacobianOperator,
    weight: Bracket | None,
    settings: NormSettings,
    delta: float,
) -> Bracket:
    """‖W J_b‖₂ for every sample: (B,). Where no bound rests on its upper end, that may be wrong now and then."""
    if operator.is_identity and weight is not None:
        return Bracket(*(end.expand(len(operator.template)) for end in weight))
    delta = delta if settings.norm == "joint" else max(delta, _SLACK_DELTA)
    return _operator_norm(operator.times_weight(layer.weight), settings, delta)


def _operator_norm(operator: jacobians.JacobianOperator, settings: NormSettings, delta: float) -> Bracket:
    """‖J_b‖₂ for every sample, by as many samples at a time as the memory allows: (B,)."""
    template = operator.template
    batch_size, rows = template.shape
    if operator.is_identity:
        return spectral.exact_bracket(template.new_ones(batch_size))
    iterated = _is_iterated(rows, settings)
    vectors = _KRYLOV_VECTORS if iterated else rows * _DENSE_COPIES
    chunk = max(settings.memory_budget // (vectors * operator.widest * template.element_size()), 1)
    if chunk >= batch_size or (iterated and operator.part is None):  # a part would take as much as the whole
        chunk = batch_size
    start = spectral.normal_start((batch_size, rows), operator.support, template, seed=0) if iterated else template
    brackets = []
    for samples in torch.arange(batch_size, device=template.device).split(chunk):
        part = operator if chunk == batch_size else operator.restricted(samples)
        if iterated:
            brackets.append(_iterated_norm(part, start[samples], settings, delta))
        else:
            brackets.append(spectral.dense_bracket(part.materialize()))
    return Bracket(*(torch.cat(ends) for ends in zip(*brackets, strict=True)))


def _iterated_norm(
    operator: jacobians.JacobianOperator, start: Tensor, settings: NormSettings, delta: float
) -> Bracket:
    part = operator.part
    restrict = None if part is None else lambda samples: part(samples).gram
    return spectral.lanczos_bracket(operator.gram, start, delta=delta, rtol=settings.rtol, restrict=restrict)


def _weight_norms(weights: Sequence[Tensor], settings: NormSettings, delta: float) -> list[Bracket]:
    """‖W‖₂ of every weight, 0-dim: those that are iterated side by side, as rows of one iteration."""
    iterated = [weight for weight in weights if _is_iterated_weight(weight, settings)]
    found = iter(_stacked_norms(iterated, settings, delta)) if iterated else iter([])
    return [
        next(found) if _is_iterated_weight(weight, settings) else spectral.dense_bracket(weight) for weight in weights
    ]


def _stacked_norms(weights: Sequence[Tensor], settings: NormSettings, delta: float) -> list[Bracket]:
    rows = max(len(weight) for weight in weights)
    products = [jacobians.gram_of(weight) for weight in weights]

    def gram(u: Tensor) -> Tensor:
        out = torch.zeros_like(u)
        for row, (weight, product) in enumerate(zip(weights, products, strict=True)):
            out[row : row + 1, : len(weight)] = product(u[row : row + 1, : len(weight)])
        return out

    support = torch.stack([torch.arange(rows, device=weight.device) < len(weight) for weight in weights])
    start = spectral.normal_start((len(weights), rows), support, weights[0], seed=1)
    bracket = spectral.lanczos_bracket(gram, start, delta=delta, rtol=settings.rtol)
    return [Bracket(*ends) for ends in zip(*bracket, strict=True)]


def _is_iterated(rows: int, settings: NormSettings) -> bool:
    """Whether the norm of a matrix of so many rows for every sample is iterated; singular values are exact."""
    return settings.method == "krylov" or (settings.method == "auto" and rows > _DENSE_ROWS)


def _is_iterated_weight(weight: Tensor, settings: NormSettings) -> bool:
    return settings.method == "krylov" or (settings.method == "auto" and min(weight.shape) > _DENSE_WEIGHT)


# Below these sizes explicit singular values cost less than the Lanczos steps that they would replace.
_DENSE_ROWS = 16
_DENSE_WEIGHT = 64
_SLACK_DELTA = 1e-2  # of one bracket of ‖W J‖ that serves the slack alone: its lower end is what counts
_KRYLOV_VECTORS = 16  # of a sample's vectors at a time, diagonals and intermediate products included
_DENSE_COPIES = 8  # of one row of an explicit Jacobian: itself, stacked, and in float64 (see `dense_bracket`)
