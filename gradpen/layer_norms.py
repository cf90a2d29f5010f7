"""‖W_t‖, ‖J_t‖ and ‖W_t J_t‖ of the layers in the sum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gradpen import jacobians, spectral
from gradpen._numerics import widest_float
from gradpen.cut_layers import CutLayer
from gradpen.dense_chain import DenseChain
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


def default_budget(device: torch.device) -> int:
    """Bytes that the norms may take where the caller names no number."""
    if device.type == "cpu":
        return _SMALL_BUDGET
    if device.type != "cuda":
        return _LARGE_BUDGET
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    return min(max(free // 4, _SMALL_BUDGET), _LARGE_BUDGET)


@dataclass(frozen=True)
class LayerNorms:
    """Norms of one layer; `weight` is 0-dim, the others are (B,)."""

    denominator: Bracket  # ‖W‖‖J‖, or ‖W J‖ for the joint norm
    weight: Bracket | None
    jacobian: Bracket | None
    product: Bracket | None  # ‖W J‖

    def without(self, samples: Tensor) -> LayerNorms:
        """The same with nothing to divide by, so that the layer counts 0, for samples where a mask (B,) is True."""
        lower, upper = (end.masked_fill(samples, 0) for end in self.denominator)
        return replace(self, denominator=Bracket(lower, upper))


def jacobian_operators(
    recording: Recording, layers: Sequence[CutLayer], chain: DenseChain | None = None
) -> list[jacobians.JacobianOperator]:
    """J_t for every layer in the sum; a chain of dense layers and elementwise activations is multiplied out.

    If the graph did not show it to be one, the whole chain is tried at once, and if something in it is none, link by link.
    """
    if not layers:
        return []
    if chain is not None:
        by_weight = dict(zip(map(id, chain.weights), jacobians.chain_jacobians(chain), strict=True))
        if all(id(layer.call.weight) in by_weight for layer in layers):
            return [by_weight[id(layer.call.weight)] for layer in layers]
    columns = sum(tensor[0].numel() for tensor in recording.inputs)
    outputs = [layer.call.checked_input() for layer in layers]
    first = jacobians.autograd_jacobian(outputs[0], recording.inputs)
    if jacobians.is_identity(first, columns):
        first = jacobians.JacobianOperator.identity(outputs[0].detach())
    slopes = [
        jacobians.elementwise_slope(output, before.call.output)
        for output, before in zip(outputs[1:], layers, strict=False)
    ]
    links = [(layer.weight, slope) for layer, slope in zip(layers, slopes, strict=False) if slope is not None]
    whole = len(links) == len(slopes) and (
        not links or jacobians.chain_holds(first, links, outputs[1:], recording.inputs)
    )
    operators = [first]
    for output, layer, slope in zip(outputs[1:], layers, slopes, strict=False):
        link = [] if slope is None else [(layer.weight, slope)]
        if link and (whole or jacobians.chain_holds(operators[-1], link, [output], recording.inputs)):
            operators.append(operators[-1].linked(*link[0]))
        else:
            operators.append(jacobians.autograd_jacobian(output, recording.inputs))
    return operators


def layer_norms(
    layers: Sequence[CutLayer], operators: Sequence[jacobians.JacobianOperator], settings: NormSettings
) -> list[LayerNorms]:
    """All norms that the settings ask for; the failure probability is shared by the brackets that may fail."""
    has_factors = settings.norm == "spectral" or (settings.norm == "joint" and settings.slack)
    has_product = settings.norm == "joint" or settings.slack
    wanted: Operators = {}
    for position, (layer, operator) in enumerate(zip(layers, operators, strict=True)):
        if has_factors or (has_product and operator.is_identity):
            wanted[position, "weight"] = _weight_operator(layer, operator)
        if has_factors and not operator.is_identity:
            wanted[position, "jacobian"] = operator
        if has_product and not operator.is_identity:
            wanted[position, "product"] = operator.times_weight(layer.weight)
    found = _spectral_norms(wanted, [layer.weight for layer in layers], settings)
    return [
        _assembled(layer, operator, {kind: found[p, kind] for p, kind in found if p == position}, settings)
        for position, (layer, operator) in enumerate(zip(layers, operators, strict=True))
    ]


def _weight_operator(layer: CutLayer, operator: jacobians.JacobianOperator) -> jacobians.JacobianOperator:
    """W; as one of the samples of W J if J is I, and W Wᵀ is formed anyway."""
    if not operator.is_identity or layer.weight.data_ptr() not in operator.grams:
        return jacobians.matrix_operator(layer.weight)
    return operator.times_weight(layer.weight).restricted(torch.zeros(1, dtype=torch.long, device="cpu"))


Key = tuple[int, str]  # (position of the layer, which of its norms)
Operators = dict[Key, jacobians.JacobianOperator]


def _assembled(
    layer: CutLayer, operator: jacobians.JacobianOperator, found: dict[str, Bracket], settings: NormSettings
) -> LayerNorms:
    """The norms of one layer; J_1 = I, so that W_1 J_1 is W_1."""
    ones = widest_float(operator.template.new_ones(len(operator.template)))
    product = found.get("product")
    if operator.is_identity and (settings.norm == "joint" or settings.slack):
        product = Bracket(found["weight"].lower * ones, found["weight"].upper * ones)
    if settings.norm == "joint" and not settings.slack:
        assert product is not None
        return LayerNorms(product, None, None, product)
    if settings.norm == "frobenius":
        weight = spectral.exact_bracket(widest_float(layer.weight).square().sum().sqrt())
        jacobian = spectral.exact_bracket(operator.sq_frobenius_norm().sqrt())
    else:
        weight = found["weight"]
        jacobian = spectral.exact_bracket(ones) if operator.is_identity else found["jacobian"]
    apart = Bracket(weight.lower * jacobian.lower, weight.upper * jacobian.upper)
    denominator = apart if product is None or settings.norm != "joint" else product
    return LayerNorms(denominator, weight, jacobian, product)


def _spectral_norms(wanted: Operators, weights: Sequence[Tensor], settings: NormSettings) -> dict[Key, Bracket]:
    """‖·‖₂ of every sample of every operator: (B,), 0-dim for a weight.

    Where no bound rests on the upper end of ‖W J‖, it may fail now and then.
    """
    iterated = {key: operator for key, operator in wanted.items() if _is_iterated(key[1], operator, settings)}
    estimates = set() if settings.norm == "joint" else {key for key in iterated if key[1] == "product"}
    samples = max((len(operator.template) for operator in iterated.values()), default=1)
    certified = sum(
        samples for key in iterated if key not in estimates
    )  # ‖W‖ counts as often: a sample's share is fixed
    delta = settings.delta / max(certified, 1)
    deltas = {key: max(delta, _SLACK_DELTA) if key in estimates else delta for key in iterated}
    found = _norms_with_weights(iterated, deltas, weights, settings)
    for key, operator in wanted.items():
        if key not in iterated:
            is_weight = key[1] == "weight"
            found[key] = (
                spectral.dense_bracket(weights[key[0]].unsqueeze(0)) if is_weight else _dense_norms(operator, settings)
            )
    return {
        key: Bracket(bracket.lower[0], bracket.upper[0]) if key[1] == "weight" else bracket
        for key, bracket in found.items()
    }


def _norms_with_weights(
    iterated: Operators, deltas: Mapping[Key, float], weights: Sequence[Tensor], settings: NormSettings
) -> dict[Key, Bracket]:
    """Of all operators; a weight is one of the samples of the Jacobian behind it, where there is one."""
    operators = dict(iterated)
    hosts: dict[Key, Key] = {}
    for key in iterated:
        host = (key[0] + 1, "jacobian")
        last = operators[host].last if key[1] == "weight" and host in operators else None
        if last is not None and last.weight.data_ptr() == weights[key[0]].data_ptr():
            operators[host] = last.with_weight()
            del operators[key]
            hosts[key] = host
    brackets = _iterated_norms(list(operators.values()), [deltas[key] for key in operators], settings)
    found = dict(zip(operators, brackets, strict=True))
    for key, host in hosts.items():
        found[key] = Bracket(*(end[-1:] for end in found[host]))
        found[host] = Bracket(*(end[:-1] for end in found[host]))
    return found


def _is_iterated(kind: str, operator: jacobians.JacobianOperator, settings: NormSettings) -> bool:
    """Below some size explicit singular values cost less than the Lanczos steps that they would replace."""
    size, limit = operator.template.shape[1], _DENSE_ROWS
    if kind == "weight":
        size, limit = min(size, operator.columns), _DENSE_WEIGHT
    return settings.method == "krylov" or (settings.method == "auto" and size > limit)


def _dense_norms(operator: jacobians.JacobianOperator, settings: NormSettings) -> Bracket:
    """From explicit Jacobians, of as many samples at a time as the memory allows."""
    rows = operator.template.shape[1]
    row_bytes = _DENSE_COPIES * operator.columns * operator.template.element_size()
    brackets = [
        spectral.dense_bracket(part.materialize())
        for part in _parts(operator, max(settings.memory_budget // (rows * row_bytes), 1))
    ]
    return Bracket(*(torch.cat(ends) for ends in zip(*brackets, strict=True)))


def _parts(operator: jacobians.JacobianOperator, size: int) -> Iterator[jacobians.JacobianOperator]:
    """The operator, `size` samples at a time."""
    samples = torch.arange(len(operator.template), device="cpu")
    if len(samples) <= size:
        yield operator
        return
    for part in samples.split(size):
        yield operator.restricted(part)


def _iterated_norms(
    operators: Sequence[jacobians.JacobianOperator], deltas: Sequence[float], settings: NormSettings
) -> list[Bracket]:
    """All operators in one sweep, of as many samples at a time as the memory allows.

    A sample of an operator without parts takes as much as all of them, so these are swept whole.
    """
    ends: list[list[Bracket]] = [[] for _ in operators]
    for separable in (True, False):
        numbers = [n for n, operator in enumerate(operators) if (operator.part is not None) == separable]
        size = max((len(operators[n].template) for n in numbers), default=0)
        if separable and numbers:
            widest = [operators[n].widest * operators[n].template.element_size() for n in numbers]
            size = min(size, max(settings.memory_budget // (_KRYLOV_VECTORS * sum(widest)), 1))
        parts = [_parts(operators[n], size) for n in numbers]
        starts = [_start(operators[n], seed=n).split(size) for n in numbers]
        for sweep in itertools.zip_longest(*(zip(*pair, strict=True) for pair in zip(parts, starts, strict=True))):
            present = [(n, *entry) for n, entry in zip(numbers, sweep, strict=True) if entry is not None]
            swept = _swept_norms(
                [e[1] for e in present], [e[2] for e in present], [deltas[e[0]] for e in present], settings
            )
            for (n, *_), bracket in zip(present, swept, strict=True):
                ends[n].append(bracket)
    return [Bracket(*(torch.cat(end) for end in zip(*brackets, strict=True))) for brackets in ends]


def _start(operator: jacobians.JacobianOperator, seed: int) -> Tensor:
    batch_size, rows = operator.template.shape
    shared = spectral.normal_start((1, rows), None, operator.template, seed)  # a norm depends on no other sample
    return shared.expand(batch_size, rows) if operator.diagonal is None else shared * (operator.diagonal != 0)


def _swept_norms(
    operators: Sequence[jacobians.JacobianOperator],
    starts: Sequence[Tensor],
    deltas: Sequence[float],
    settings: NormSettings,
) -> list[Bracket]:
    """One iteration for all samples of all operators."""
    sizes = [len(start) for start in starts]
    whole = jacobians.OperatorStack(operators)
    start = torch.cat([F.pad(start, (0, whole.length - start.shape[1])) for start in starts])
    delta = torch.tensor(deltas, dtype=torch.float64, device="cpu").repeat_interleave(torch.tensor(sizes, device="cpu"))
    bracket = spectral.lanczos_bracket(
        whole.gram_within,
        start,
        delta=delta,
        rtol=settings.rtol,
        restrict=lambda samples: whole.restricted(samples).gram_within,
    )
    return [Bracket(*ends) for ends in zip(bracket.lower.split(sizes), bracket.upper.split(sizes), strict=True)]


_SMALL_BUDGET, _LARGE_BUDGET = 2**26, 2**30  # of which a CPU's caches, and a GPU's cores, have more
_DENSE_ROWS = 16
_DENSE_WEIGHT = 64
_SLACK_DELTA = 1e-2  # of one bracket of ‖W J‖ that serves the slack alone: its lower end is what counts
_KRYLOV_VECTORS = 16  # of a sample's vectors at a time, diagonals and intermediate products included
_DENSE_COPIES = 8  # of one row of an explicit Jacobian: itself, stacked, and in float64 (see `dense_bracket`)
