"""Formulas for chains of dense layers within `torch.compile`.

`eager look at the model → ChainPlan, a constant of the graph → evaluate(plan, x, target, *leaves) → squared norms`

`evaluate` is put into the graph as it is: the compiler behind Dynamo runs it, node of the autograd graph and all, and keeps
what its tensors do. So there is one derivation of every formula, that of eager mode. What the plan does not say,
`torch.compile` has guards for, since the model is traced beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpen import chain_terms
from gradpen.chain_terms import Request
from gradpen.criteria import Criterion
from gradpen.dense_chain import KINDS, DenseChain, Elementwise, Kind
from gradpen.recording import Call
from gradpen.terms import InputTerm, ParamTerm, Term

_TERMS: dict[str, type[Term]] = {"input": InputTerm, "param": ParamTerm}


class Wanted(NamedTuple):
    """What is asked for.

    Attributes:
        term: key in `_TERMS`, and the fields, without a filter of parameters.
        as_mean: the mean of the squared norms is enough.
        parameters: names of the parameters that count.
    """

    term: tuple[Any, ...]
    as_mean: bool
    parameters: tuple[str, ...]


class ChainPlan(NamedTuple):
    """What eager mode has found out, in numbers, strings and tuples: it can be a constant of a graph.

    Attributes:
        weights: names of the W_t.
        biases: names of the b_t, None where there is none.
        calls: which of the forward pass's layer calls they are; it may have others, that lead elsewhere.
        functions: what lies between the layers: key in `KINDS`, None for nothing, and its options.
        wanted: what is asked for, all of the f_i of one cross entropy or of random directions of the output.
        reduction: of the data loss, if that is the same cross entropy; else None.
        first_order: norms are finite differences, and nothing is differentiated twice.
    """

    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    calls: tuple[int, ...]
    functions: tuple[tuple[str | None, tuple[Any, ...]], ...]
    wanted: tuple[Wanted, ...]
    reduction: str | None
    first_order: bool

    @classmethod
    def from_constant(cls, constant: Sequence[Any]) -> ChainPlan:
        """From itself, whatever a compiler has made of its named tuples."""
        plan = cls(*constant)
        return plan._replace(wanted=tuple(Wanted(*one) for one in plan.wanted))

    @property
    def names(self) -> list[str]:
        """Of all weights, and then of all biases that there are: the leaves, as `evaluate` expects them."""
        return [*self.weights, *[name for name in self.biases if name is not None]]

    @property
    def uses(self) -> tuple[tuple[str, tuple[tuple[int, str], ...]], ...]:
        """Name → the one call that uses it, and as what."""
        rows = (("weight", self.weights), ("bias", self.biases))
        return tuple(
            (name, ((call, role),))
            for role, row in rows
            for call, name in zip(self.calls, row, strict=True)
            if name is not None
        )

    @property
    def are_squared(self) -> tuple[bool, ...]:
        """For all that is wanted, whether `evaluate` gives squared norms, as it does but for finite differences."""
        return tuple(not (self.first_order and "finite_difference" in one.term) for one in self.wanted)


def plan_of(
    chain: DenseChain,
    model: nn.Module,
    calls: Sequence[Call],
    requests: Sequence[Request],
    data: Criterion | None,
    target: Any,
    *,
    create_graph: bool,
) -> ChainPlan | None:
    """None if there are no formulas, or only such as call functions of the user, which Dynamo would not see.

    Args:
        chain: an eager forward pass of the model.
        model: whose parameters have names.
        calls: its layer calls.
        requests: what is asked for; `chain_terms.have_formulas` of it.
        data: criterion of the data loss, if there is one.
        target: of the criteria.
        create_graph: somebody differentiates the squared norms.
    """
    if any(between.factor is not None for between in chain.between):  # dropout's mask is drawn by the model
        return None
    scalars = [request.function for request in requests if request.projection is None]
    if not all(scalar.is_cross_entropy_at(chain.output) for scalar in scalars):
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = _places_of(chain, calls)
    if places is None or not all(id(leaf) in names for leaf in chain.leaves):
        return None
    kinds = {id(kind): name for name, kind in KINDS.items()}
    functions = [(None if one.kind is None else kinds[id(one.kind)], one.options) for one in chain.between]
    return ChainPlan(
        weights=tuple(names[id(weight)] for weight in chain.weights),
        biases=tuple(None if bias is None else names[id(bias)] for bias in chain.biases),
        calls=places,
        functions=tuple(functions),
        wanted=tuple(_wanted(request) for request in requests),
        reduction=None if data is None or not data.scalar(target).is_cross_entropy_at(chain.output) else data.reduction,
        first_order=create_graph and any(request.difference is not None for request in requests),
    )


def _places_of(chain: DenseChain, calls: Sequence[Call]) -> tuple[int, ...] | None:
    """Which of the calls each layer is; None if one is no call (`x @ w.t()`), or its weight is used by others, too."""
    places = []
    for weight, bias in zip(chain.weights, chain.biases, strict=True):
        uses = [place for place, call in enumerate(calls) if call.weight is weight]
        if len(uses) != 1 or calls[uses[0]].bias is not bias:
            return None
        places += uses
    return tuple(places)


def _wanted(request: Request) -> Wanted:
    term = request.term
    if isinstance(term, ParamTerm):
        term = dataclasses.replace(term, parameters=None)
    kind = next(name for name, its_type in _TERMS.items() if isinstance(term, its_type))
    fields = [getattr(term, field.name) for field in dataclasses.fields(term)]
    return Wanted((kind, *fields), request.as_mean, tuple(request.parameters or ()))


@torch.compiler.allow_in_graph
def evaluate(constant: Sequence[Any], x: Tensor, target: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Output, values of the norms that are wanted, in order, and the data loss if there is a formula for it.

    Args:
        constant: a `ChainPlan`.
        x: what the first layer is given, (B, n_0).
        target: classes, (B,).
        *leaves: those of the plan's `names`.
    """
    plan = ChainPlan.from_constant(constant)
    named = dict(zip(plan.names, leaves, strict=True))
    chain = _run(plan, x, named)
    criterion = Criterion(F.cross_entropy, plan.reduction or "mean")
    requests = [_request(one, criterion, target, named) for one in plan.wanted]
    data = None if plan.reduction is None else (criterion, target)
    found = chain_terms.evaluate(None, chain, requests, create_graph=True, data=data, first_order=plan.first_order)
    assert found is not None
    data_loss = () if found.data_loss is None else (found.data_loss,)
    return (found.output, *[norms.values for norms in found.norms], *data_loss)


def _request(wanted: Wanted, criterion: Criterion, target: Tensor, named: Mapping[str, Tensor]) -> Request:
    kind, *fields = wanted.term
    term = _TERMS[kind](*fields)
    counted = {name: named[name] for name in wanted.parameters if name in named}
    return Request(term, counted, "cross entropy", term.scalar(criterion, target), wanted.as_mean)


@torch.no_grad()
def _run(plan: ChainPlan, x: Tensor, named: Mapping[str, Tensor]) -> DenseChain:
    """The forward pass."""
    weights = tuple(named[name] for name in plan.weights)
    biases = tuple(None if name is None else named[name] for name in plan.biases)
    hidden, between = [x], []
    z = first = F.linear(x, weights[0], biases[0])
    for (name, options), weight, bias in zip(plan.functions, weights[1:], biases[1:], strict=True):
        h, there = Elementwise(_kind(name, options), tuple(options)).at(z)
        hidden.append(h)
        between.append(there)
        z = F.linear(h, weight, bias)
    return DenseChain(weights, biases, tuple(hidden), tuple(between), z, first if plan.first_order else None)


# The compiler saves what forward and backward pass have in common: of g' a mask of one byte an entry, which its kernels for
# CPUs write and read many times as slowly as numbers. So the backward pass asks for it in other words, by the h that it has.


def _relu_backward_anew(cotangent: Tensor, result: Tensor) -> Tensor:
    return torch.where(result > 0, cotangent, 0.0)


def _leaky_relu_backward(cotangent: Tensor, result: Tensor, slope: float) -> Tensor:
    return torch.ops.aten.leaky_relu_backward(cotangent, result, slope, True)


def _leaky_relu_backward_anew(cotangent: Tensor, result: Tensor, slope: float) -> Tensor:
    return torch.where(result <= 0, cotangent * slope, cotangent)


def _in_other_words(kind: Kind, backward: Callable[..., Tensor]) -> Kind:
    return dataclasses.replace(kind, in_backward=dataclasses.replace(kind, backward=backward, backward_into=None))


_RELU = _in_other_words(KINDS["ReluBackward0"], _relu_backward_anew)
_LEAKY_RELU = _in_other_words(  # by the result, which has the sign of z if the slope is positive
    dataclasses.replace(KINDS["LeakyReluBackward0"], saved="_saved_result", backward=_leaky_relu_backward),
    _leaky_relu_backward_anew,
)


def _kind(name: str | None, options: Sequence[Any]) -> Kind | None:
    """The function by its key in `KINDS`, as the compiler had best see it."""
    if name == "ReluBackward0":
        return _RELU
    if name == "LeakyReluBackward0" and options[0] > 0:
        return _LEAKY_RELU
    return None if name is None else KINDS[name]
