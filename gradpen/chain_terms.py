"""Squared norms for models that are chains of dense layers, by formulas: the same numbers, at less cost.

`recorded forward → is it a chain? → f on its output → ∂f/∂output → squared norms`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradpen import _checks, mixing
from gradpen._graph import check_derivable_twice, walk_graph
from gradpen._numerics import sum_tensors
from gradpen.chain_mean import Difference, with_known_gradient
from gradpen.chain_norms import DataLoss, Measured, NormOf, deltas_of, differentiable, output_with_graph, sq_norms
from gradpen.cotangents import Constant, OfCrossEntropy, OfScalar, cotangent_of
from gradpen.criteria import Criterion, Scalar
from gradpen.dense_chain import DenseChain, read_chain
from gradpen.gradients import random_directions
from gradpen.recording import Recording
from gradpen.terms import GroupNorms, InputTerm, ParamTerm, Term


class Request(NamedTuple):
    """What is asked for.

    Attributes:
        term: which squared norm.
        parameters: name → parameter, those that count; None: all that the chain has.
        key: equal for requests of the same f.
        function: the model's output → f.
        as_mean: the mean of the squared norms is enough.
    """

    term: Term
    parameters: Mapping[str, Tensor] | None
    key: Any
    function: Scalar
    as_mean: bool = False

    @property
    def projection(self) -> InputTerm | None:
        """The term, if it asks for random directions of the output."""
        return self.term if isinstance(self.term, InputTerm) and self.term.method == "projection" else None

    @property
    def difference(self) -> ParamTerm | None:
        """The term, if it asks for a finite difference over the batch."""
        return self.term if isinstance(self.term, ParamTerm) and self.term.is_batch_difference else None


class Found(NamedTuple):
    """What is given.

    Attributes:
        output: of the model.
        norms: what each request came to.
        data_loss: the data loss with its gradient, if there is a formula for it.
    """

    output: Tensor
    norms: list[GroupNorms]
    data_loss: Tensor | None


def have_formulas(requests: Sequence[Request], *, first_order: bool) -> bool:
    """Whether all that is asked for, if anything, can be had from a chain; differences only if all else is `first_order`."""
    return bool(requests) and all(
        _has_formula(request) or (first_order and request.difference is not None) for request in requests
    )


def evaluate(
    model: nn.Module | None,
    chain: DenseChain,
    requests: Sequence[Request],
    *,
    create_graph: bool,
    data: tuple[Criterion, Any] | None = None,
    first_order: bool = False,
) -> Found | None:
    """All requests, which `have_formulas`; None if f depends on more than the output.

    Args:
        model: the model, or None if all f_i are known to be cross entropies.
        chain: its forward pass.
        requests: what is asked for.
        create_graph: keep the squared norms differentiable.
        data: criterion and target of the data loss, if that is going to be differentiated too.
        first_order: all requests are of the f_i that the data loss is made of and need no more than first derivatives, so
            that its gradient comes with theirs.

    Raises:
        RuntimeError: if f_i depends on the output of other samples than i.
    """
    if data is not None and first_order:
        return _with_known_gradient(model, chain, requests, *data, create_graph)
    return _by_formulas(model, chain, requests, create_graph, data)


def _by_formulas(
    model: nn.Module | None,
    chain: DenseChain,
    requests: Sequence[Request],
    create_graph: bool,
    data: tuple[Criterion, Any] | None,
) -> Found | None:
    groups = [
        (places, tuple([_norm_of(requests[place], chain) for place in places])) for places in _by_scalar(requests)
    ]
    cotangents: dict[int, OfScalar] = {}  # by the first place of the group
    for places, norms in groups:
        if requests[places[0]].projection is None:
            cotangent = _cotangent_of(model, chain.output, requests[places[0]], norms, create_graph)
            if cotangent is None:
                return None
            cotangents[places[0]] = cotangent
    measured: list[Measured] = []
    for places, norms in groups:
        projection = requests[places[0]].projection
        if projection is None:
            measured.append(Measured(cotangents[places[0]], norms))
        else:
            _checks.check_not_empty(chain.output)
            directions = [
                random_directions(chain.output, projection.generator) for _ in range(projection.num_projections)
            ]
            measured += [Measured(Constant(direction), norms) for direction in directions]
    data_loss = None
    found: Sequence[Sequence[Tensor]]
    if create_graph:
        wanted = None if data is None else _data_loss(chain.output, cotangents.values(), *data)
        output, data_loss, found = differentiable(chain, measured, wanted)
    else:
        output = output_with_graph(chain)
        with torch.no_grad():
            found = [sq_norms(chain, deltas_of(chain, c.value, norms), norms) for c, norms in measured]
    values: dict[int, Tensor] = {}
    remaining = iter(found)
    for places, _ in groups:
        projection = requests[places[0]].projection
        if projection is None:
            values |= zip(places, next(remaining), strict=True)
        else:
            estimates = [estimate for (estimate,) in islice(remaining, projection.num_projections)]
            values[places[0]] = sum_tensors(estimates) / len(estimates) if len(estimates) > 1 else estimates[0]
    return Found(output, [GroupNorms(values[place]) for place in range(len(requests))], data_loss)


def _with_known_gradient(
    model: nn.Module | None,
    chain: DenseChain,
    requests: Sequence[Request],
    data: Criterion,
    target: Any,
    create_graph: bool,
) -> Found | None:
    """All requests are of the f_i that the data loss is made of, and need first derivatives only."""
    terms = [request.difference if create_graph else None for request in requests]  # their values need none
    if any(terms) and chain.output.requires_grad:
        return None  # what a model did by its graph may be something else where the parameters are displaced
    norms = [_norm_of(request, chain) for request in requests]
    cotangent = _cotangent_of(model, chain.output, requests[0], norms, create_graph=False)
    if cotangent is None:
        return None
    exact = [norm for norm, term in zip(norms, terms, strict=True) if term is None]
    differences = [
        Difference(norm, term.scheme, term.step) for norm, term in zip(norms, terms, strict=True) if term is not None
    ]
    with torch.no_grad():
        deltas = deltas_of(chain, cotangent.value, exact)
        values = iter(sq_norms(chain, deltas, exact))
        data_loss = _data_loss(chain.output, [cotangent], data, target)
        if data_loss is None:
            value = data.data_loss(chain.output, target)
            multiple = data.over_mean(value, cotangent.f.mean(), chain.output.shape[0], target)
            data_loss = DataLoss(value, cotangent, multiple)
    output, with_gradient, roots = with_known_gradient(chain, deltas, data_loss, differences)
    differences_found = iter([GroupNorms(root.unsqueeze(0), are_squared=False) for root in roots])
    found = [GroupNorms(next(values)) if term is None else next(differences_found) for term in terms]
    return Found(output, found, with_gradient)


def _data_loss(output: Tensor, known: Iterable[OfScalar], criterion: Criterion, target: Any) -> DataLoss | None:
    """The data loss, if there is a formula for its gradient; from ∂f_i/∂output if that is among the known ones."""
    function = criterion.scalar(target)
    same = (one for one in known if isinstance(one, OfCrossEntropy) and one.is_of(function))
    cotangent = next(same, None)
    if cotangent is None:
        if not function.is_cross_entropy_at(output):
            return None
        cotangent = OfCrossEntropy(function, output)
    value, multiple = cotangent.data_loss(criterion.reduction)
    return DataLoss(value, cotangent, multiple)


def chain_of(recording: Recording) -> DenseChain | None:
    """The model as a chain, if it is one: from the very input on, where that requires grad."""
    differentiable = [tensor for tensor in recording.inputs if tensor.requires_grad]
    if not differentiable:
        return read_chain(recording.output, None)
    return read_chain(recording.output, differentiable[0]) if len(recording.inputs) == 1 else None


def _has_formula(request: Request) -> bool:
    term = request.term
    if isinstance(term, InputTerm):
        return request.projection is not None or (term.method == "exact" and term.of != "output")
    return term.method == "exact" and term.over in ("sample", "batch")


def _by_scalar(requests: Sequence[Request]) -> list[list[int]]:
    """Places of the requests, those of one f together; a projection has directions of its own."""
    groups: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        key = ("projection", place) if request.projection else ("f", request.key)
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def _norm_of(request: Request, chain: DenseChain) -> NormOf:
    if isinstance(request.term, InputTerm):
        nothing = (False,) * len(chain.weights)
        return NormOf("input", nothing, nothing, request.as_mean)
    if request.parameters is None:
        all_weights = (True,) * len(chain.weights)
        all_biases = tuple([bias is not None for bias in chain.biases])
        return NormOf(str(request.term.over), all_weights, all_biases, request.as_mean)
    counted = {id(parameter) for parameter in request.parameters.values()}
    weights = tuple([id(weight) in counted for weight in chain.weights])
    biases = tuple([id(bias) in counted for bias in chain.biases])
    return NormOf(str(request.term.over), weights, biases, request.as_mean)


def _cotangent_of(
    model: nn.Module | None, output: Tensor, request: Request, norms: Sequence[NormOf], create_graph: bool
) -> OfScalar | None:
    """∂f_i/∂output, or None if anything else that can be differentiated leads to f, or not even that."""
    cotangent = cotangent_of(request.function, output)
    if isinstance(cotangent, OfCrossEntropy):
        return cotangent
    assert model is not None
    f = cotangent.f
    if not f.requires_grad or f.shape != output.shape[:1]:
        return None
    walk = walk_graph(f)
    if any(leaf is not cotangent.output for leaf in walk.leaves.values()):
        return None
    if create_graph:
        check_derivable_twice(walk, [cotangent.output])
    if any(norm.what != "batch" for norm in norms):
        alone = Recording(cotangent.output, [cotangent.output])
        mixing.check_inputs_unmixed(model, f, request.function, alone, walk)
    return cotangent
