"""Several squared gradient norms from one forward pass.

`(model, x, y) → one recorded forward → f and its gradients, once for every distinct f → squared norms by group`
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradpen import _checks, chain_terms, finite_difference, gradients, mixing, param_norms
from gradpen._graph import GraphWalk, check_derivable_twice, compiled_for_several_passes, edge_of, walk_graph
from gradpen._numerics import sum_tensors
from gradpen.criteria import Criterion, Scalar
from gradpen.dense_chain import DenseChain
from gradpen.isolation import runs_eagerly
from gradpen.module_chain import run_chain
from gradpen.recording import (
    Recording,
    RngState,
    call_model,
    call_with,
    copied_buffers,
    float_tensors,
    map_tensors,
    record_forward,
    tensors_of,
)
from gradpen.terms import GroupNorms, InputTerm, ParamTerm, Term, select_parameters


class Evaluation(NamedTuple):
    """What one forward pass was good for.

    Attributes:
        output: the model's.
        norms: what each term came to.
        data_loss: if its gradient was found on the way.
        leaves: the tensors to be differentiated by that output, norms and data loss depend on, if they are known to be all.
    """

    output: Any
    norms: list[GroupNorms]
    data_loss: Tensor | None = None
    leaves: Sequence[Tensor] = ()


@dataclass(frozen=True)
class _Pass:
    """One forward pass and what it started from."""

    model: nn.Module
    x: Any
    recording: Recording
    rng: RngState  # before the forward pass, as are the next two
    buffers: dict[str, Tensor] | None = None  # None: nobody displaces anything
    versions: tuple[int, ...] = ()  # of the tensors in x

    def check_repeatable(self) -> None:
        """A finite difference compares with a second forward pass, from the same x.

        Raises:
            RuntimeError: if the first one has changed x.
        """
        check_unchanged(self.x, self.versions)


@dataclass
class _OtherStreams:
    """Whether a model draws random numbers of NumPy or Python (to skip layers, say), which a second pass has to repeat.

    To read these streams takes as long as a small layer. A model that was never seen to draw from them is looked at again
    after 1, 2, 4, 8, … uses.
    """

    uses: int = 0
    moved: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> _OtherStreams:
        return _other_streams.setdefault(model, cls())

    def to_be_read(self) -> bool:
        self.uses += 1
        return self.moved or self.uses.bit_count() == 1


_other_streams: weakref.WeakKeyDictionary[nn.Module, _OtherStreams] = weakref.WeakKeyDictionary()


@dataclass
class _ScalarGradients:
    """f on one forward pass, and its gradients, computed when first asked for."""

    model: nn.Module
    function: Scalar
    recording: Recording
    create_graph: bool = True
    inputs: bool = False
    deltas: bool = False
    _mixed_calls: frozenset[int] | None = None

    @cached_property
    def f(self) -> Tensor:
        return self.function(self.recording.output)

    @cached_property
    def gradients(self) -> gradients.SampleGradients:
        return gradients.sample_gradients(
            self.f.sum(), self.recording, inputs=self.inputs, deltas=self.deltas, create_graph=self.create_graph
        )

    @cached_property
    def walk(self) -> GraphWalk:
        return walk_graph(self.f)

    def find_mixed_calls(self) -> frozenset[int]:
        """`mixing.find_mixed_calls`, asked once for all terms of this f."""
        if self._mixed_calls is None:
            self._mixed_calls = mixing.find_mixed_calls(
                self.model, self.f, self.function, self.recording, self.gradients, self.walk
            )
        return self._mixed_calls

    def known_mean(self, x: Any) -> finite_difference.KnownGradient:
        """mean_i f_i with its gradient computed now, and with it whatever gradients are wanted of the f_i."""
        gradients.check_differentiable(self.f)
        places = gradients.places_of(self.recording, inputs=self.inputs, deltas=self.deltas)
        with gradients.behind_hooks(self.recording) as arrived:
            known = finite_difference.with_known_gradient(self.f.mean(), x, along=places, walk=self.walk)
        rows = [None if gradient is None else gradient * len(self.f) for gradient in known.along]
        arrived = {index: gradient * len(self.f) for index, gradient in arrived.items()}
        self.gradients = gradients.gradients_at_places(rows, self.recording, arrived, inputs=self.inputs)
        return known


def evaluate_terms(
    model: nn.Module,
    x: Any,
    y: Any,
    terms: Sequence[tuple[Term, Criterion]],
    *,
    means: Sequence[bool] = (),
    data: Criterion | None = None,
    create_graph: bool = True,
) -> Evaluation:
    """Compute what the terms ask for from one forward pass; terms of the same f share one backward pass.

    If nothing is going to be differentiated twice, the backward pass that the terms need gives the gradient of the data loss
    as well: it is kept, and handed out when the data loss is differentiated.

    Args:
        model: any module.
        x: tensor, tuple or dict.
        y: target of the criteria.
        terms: (term, criterion) pairs.
        means: for every term, whether the mean of the squared norms may be given in their place; () for none.
        data: criterion of the data loss, if that is going to be differentiated too.
        create_graph: keep the squared norms differentiable.

    Raises:
        TypeError, ValueError, RuntimeError: as `gradpen.functional` says.
    """
    _checks.check_model(model)
    if not terms:
        return Evaluation(call_model(model, x), [])
    _checks.check_grad_enabled()
    requests = [
        request_of(model, term, criterion, y, as_mean)
        for (term, criterion), as_mean in zip(terms, means or [False] * len(terms), strict=True)
    ]
    first_order = data is not None and one_backward_pass_does(requests, data, create_graph)

    def by_formulas(chain: DenseChain) -> Evaluation | None:
        found = chain_terms.evaluate(
            model,
            chain,
            requests,
            create_graph=create_graph,
            data=None if data is None else (data, y),
            first_order=first_order,
        )
        return None if found is None else Evaluation(found.output, found.norms, found.data_loss)

    perhaps_chain = chain_terms.have_formulas(requests, first_order=first_order) and not _is_foreign(model, requests)
    if perhaps_chain:
        foreseen = all(request.function.is_cross_entropy() for request in requests)  # no random numbers but dropout's
        before = None if foreseen else RngState.capture(torch_alone=True)
        chain = run_chain(model, x, keep_first=first_order and create_graph)
        if chain is not None:
            evaluation = by_formulas(chain)
            if evaluation is not None:
                return evaluation
            _foreign.setdefault(model, set()).update(_codes(requests))
            perhaps_chain = False
            if before is not None:
                before.restore()
    kinds = [term for term, _ in terms]
    parameters = check_call(model, kinds)
    requests = [request._replace(parameters=chosen) for request, chosen in zip(requests, parameters, strict=True)]
    input_grad = any(isinstance(term, InputTerm) for term in kinds)
    displaced = any(term.method == "finite_difference" for term in kinds)
    repeated = displaced or any(needs_deltas(term) for term in kinds)  # perhaps, for parameters without closed form
    others = _OtherStreams.of(model) if repeated else None
    rng = RngState.capture(torch_alone=others is None or not others.to_be_read())
    buffers = copied_buffers(model) if displaced else None
    versions = versions_of(x)
    perhaps_chain &= not any(tensor.requires_grad for tensor in tensors_of(x))  # nobody wants derivatives in x
    calls = perhaps_chain or any(needs_deltas(term) for term in kinds)
    with compiled_for_several_passes() if displaced else contextlib.nullcontext():
        recording = record_forward(model, x, input_grad=input_grad, calls=calls)
    if others is not None:
        others.moved = others.moved or rng.others_moved()
    chain = chain_terms.chain_of(recording) if perhaps_chain and not recording.is_hooked else None
    if chain is not None:
        after = RngState.capture(torch_alone=True)
        evaluation = by_formulas(chain)
        if evaluation is not None:
            return evaluation
        after.restore()
    forward = _Pass(model, x, recording, rng, buffers, versions)
    if displaced:
        forward.check_repeatable()
    scalars: dict[Any, _ScalarGradients] = {}
    for term, criterion in terms:
        new = _ScalarGradients(model, term.scalar(criterion, y), recording, create_graph)
        scalar = scalars.setdefault(scalar_key(term, criterion), new)
        scalar.inputs |= isinstance(term, InputTerm) and term.method == "exact"
        scalar.deltas |= needs_deltas(term)
    known = data_loss = None
    if data is not None and first_order:
        mean_f = scalars[_source_key(data.source)]
        known = mean_f.known_mean(x)
        value = data.data_loss(recording.output, y).detach()
        multiple = data.over_mean(value, known.loss, mean_f.f.shape[0], y)
        data_loss = value + multiple * (known.loss - known.loss.detach())
    norms = []
    for (term, criterion), chosen in zip(terms, parameters, strict=True):
        scalar = scalars[scalar_key(term, criterion)]
        if isinstance(term, InputTerm):
            norms.append(_input_norms(forward, scalar, term))
        else:
            norms.append(_param_norms(forward, scalar, term, criterion, y, chosen, known))
        if not create_graph:  # some of them had to build one
            norms[-1] = replace(norms[-1], values=norms[-1].values.detach())
    recording.gate.closed = True
    return Evaluation(recording.output, norms, data_loss)


def request_of(model: nn.Module, term: Term, criterion: Criterion, target: Any, as_mean: bool) -> chain_terms.Request:
    """All parameters of a chain count unless there is a filter; for another model `check_call` finds out which do."""
    chosen = None
    if isinstance(term, ParamTerm) and term.parameters is not None:
        chosen = select_parameters(model, term.parameters)
    return chain_terms.Request(term, chosen, scalar_key(term, criterion), term.scalar(criterion, target), as_mean)


# model → code of the criteria that depend on more than its output: it is not run in vain for these again
_foreign: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


def _is_foreign(model: nn.Module, requests: Sequence[chain_terms.Request]) -> bool:
    known = _foreign.get(model) if _foreign else None
    return known is not None and not known.isdisjoint(_codes(requests))


def _codes(requests: Sequence[chain_terms.Request]) -> set[Any]:
    return {mixing.code_of(request.function) for request in requests}


def one_backward_pass_does(requests: Sequence[chain_terms.Request], data: Criterion, create_graph: bool) -> bool:
    """Whether all that is asked for are first derivatives of the f that the data loss is made from."""
    key = _source_key(data.source)
    return data.follows_mean and all(
        request.key == key and (not create_graph or request.difference is not None) for request in requests
    )


def evaluate_loss_terms(
    model: nn.Module,
    loss: Tensor,
    recording: Recording,
    terms: Sequence[Term],
    *,
    batch_size: int,
    reduction: str,
) -> list[GroupNorms]:
    """Compute what exact terms ask for from a loss that somebody else computed, without a forward pass.

    The loss is the mean (or the sum) of f_i; sample i's gradients are the rows of the gradient of Σ_i f_i, so the f_i are
    not needed one by one.

    Args:
        model: whose parameters count.
        loss: 0-dim, with its graph.
        recording: the forward pass that led to it; its output is the model's output, a list of them if the model was called
            more than once, or None if that is not known.
        terms: exact terms of the loss, or of the output.
        batch_size: B.
        reduction: "mean" or "sum": how the loss was made from the f_i.

    Raises:
        ValueError: if a term needs a forward pass of its own.
        RuntimeError: as `gradpen.functional` says.
    """
    parameters = check_call(model, terms)
    _checks.check_input_rows(recording.inputs, batch_size)
    walk = walk_graph(loss)
    total = loss * batch_size if reduction == "mean" else loss
    needed = [term for term in terms if isinstance(term, ParamTerm) or term.of == "loss"]
    found = gradients.SampleGradients([], {})
    if needed:
        found = gradients.sample_gradients(
            total,
            recording,
            inputs=any(isinstance(term, InputTerm) for term in needed),
            deltas=any(needs_deltas(term) for term in needed),
        )
    mixed = _mixed_by_output(model, total, recording, found, batch_size)
    norms = []
    for term, chosen in zip(terms, parameters, strict=True):
        if isinstance(term, InputTerm):
            if term.of == "output":
                sq_norms = _jacobian_sq_norm(model, recording, term)
            else:
                check_derivable_twice(walk, recording.inputs)
                sq_norms = gradients.input_sq_norm(found.inputs)
            norms.append(GroupNorms(sq_norms))
            continue
        check_derivable_twice(walk, chosen.values())
        sizes = term.group_sizes(batch_size, total)
        if term.over == "batch":
            sq_norms = param_norms.batch_param_sq_norm(total / batch_size, list(chosen.values()))
        else:
            sq_norms = param_norms.closed_loss_sq_norm(
                total, recording, found, chosen, mixed, batch_size, term.group_size(batch_size)
            )
        norms.append(GroupNorms(sq_norms, sizes))
    return norms


def _mixed_by_output(
    model: nn.Module, total: Tensor, recording: Recording, found: gradients.SampleGradients, batch_size: int
) -> frozenset[int]:
    """`mixing.find_mixed_calls` for the linearisation of the loss at the model's outputs, if nothing else leads to it."""
    if not (found.inputs or found.deltas):
        return frozenset()
    outputs = [output for output in float_tensors(recording.output) if output.requires_grad]
    if any(output.shape[:1] != (batch_size,) for output in outputs) or not _passes_through(
        outputs, total, recording, found
    ):
        mixing.check_unambiguous(walk_graph(total), recording, found, batch_size)
        return frozenset()
    cotangents = torch.autograd.grad(total, outputs, retain_graph=True, materialize_grads=True)

    def linearised(outputs: Sequence[Tensor]) -> Tensor:
        pairs = zip(outputs, cotangents, strict=True)
        return sum_tensors([(output * cotangent).reshape(batch_size, -1).sum(1) for output, cotangent in pairs])

    return mixing.find_mixed_calls(model, linearised(outputs), linearised, recording, found)


def _passes_through(
    outputs: Sequence[Tensor], total: Tensor, recording: Recording, found: gradients.SampleGradients
) -> bool:
    """Whether what the loss depends on leads to it through the outputs alone, and through none of them to another."""
    ends = {output.grad_fn for output in outputs}
    beside = walk_graph(total, stop_at=ends).nodes - ends
    edges = [recording.calls[index].output for index in found.deltas]
    edges += [edge_of(tensor) for tensor in recording.inputs if found.inputs]
    if not outputs or any(edge.node in beside for edge in edges):
        return False
    return len(outputs) == 1 or not any(ends & (walk_graph(output).nodes - {output.grad_fn}) for output in outputs)


def _input_norms(forward: _Pass, scalar: _ScalarGradients, term: InputTerm) -> GroupNorms:
    recording = forward.recording
    if term.of == "output":
        sq_norms = _jacobian_sq_norm(forward.model, recording, term, scalar.create_graph)
        return GroupNorms(sq_norms)
    _checks.check_input_rows(recording.inputs, scalar.f.shape[0])
    if term.method == "exact":
        if scalar.create_graph:
            check_derivable_twice(scalar.walk, recording.inputs)
        scalar.find_mixed_calls()
        return GroupNorms(gradients.input_sq_norm(scalar.gradients.inputs))
    mixing.check_inputs_unmixed(forward.model, scalar.f, scalar.function, recording, scalar.walk)
    norms = finite_difference.input_norm(
        forward.model,
        forward.x,
        scalar.f,
        scalar.function,
        recording.inputs,
        scheme=term.scheme,
        step=term.step,
        replay=forward.rng.replayed,
        buffers=forward.buffers,
        create_graph=scalar.create_graph,
    )
    return GroupNorms(norms, are_squared=False)


def _jacobian_sq_norm(model: nn.Module, recording: Recording, term: InputTerm, create_graph: bool = True) -> Tensor:
    """‖J_i‖_F² over all outputs of sample i: (B,)."""
    output = check_output(recording)
    combination = generic_combination(output)
    walk = walk_graph(combination)
    if create_graph:
        check_derivable_twice(walk, recording.inputs)
    mixing.check_inputs_unmixed(model, combination, generic_combination, recording, walk)
    if term.method == "exact":
        return gradients.jacobian_sq_norm(output, recording)
    return gradients.projected_jacobian_sq_norm(output, recording, term.num_projections, term.generator)


def check_output(recording: Recording) -> Tensor:
    """The model's output as a tensor with one row for every row of the inputs."""
    output = recording.output
    if not isinstance(output, Tensor) or output.dim() == 0:
        raise TypeError(
            f'of="output" expects the model to return one tensor (B, …), got {type(output).__name__}: give a callable '
            "(output, target) → (B,) as of=…"
        )
    if output.is_complex():
        raise TypeError(
            f'of="output" expects real outputs, got {output.dtype}: let the model return torch.view_as_real(output), whose '
            "Jacobian has a row for either part"
        )
    _checks.check_not_empty(output)
    _checks.check_input_rows(recording.inputs, output.shape[0])
    return output


def generic_combination(output: Tensor) -> Tensor:
    """One scalar a sample in which no output cancels another: Σ_k cos(k) F_ik, (B,)."""
    rows = output.reshape(output.shape[0], -1)
    return rows @ torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype).cos()


def _param_norms(
    forward: _Pass,
    scalar: _ScalarGradients,
    term: ParamTerm,
    criterion: Criterion,
    y: Any,
    parameters: Mapping[str, Tensor],
    known: finite_difference.KnownGradient | None,
) -> GroupNorms:
    f = scalar.f
    group_size = term.group_size(f.shape[0])
    sizes = term.group_sizes(f.shape[0], f)
    if term.method == "finite_difference":
        norms = _finite_difference_norms(forward, scalar, term, criterion, y, parameters, known)
        return GroupNorms(norms, sizes, are_squared=False)
    if scalar.create_graph:
        check_derivable_twice(scalar.walk, parameters.values())
    if term.over == "batch":
        sq_norm = param_norms.batch_param_sq_norm(
            f, list(parameters.values()), create_graph=scalar.create_graph, walk=scalar.walk
        )
        return GroupNorms(sq_norm, sizes)
    sq_norms = param_norms.param_sq_norm(
        forward.model,
        forward.x,
        f,
        scalar.function,
        forward.recording,
        scalar.gradients,
        parameters,
        group_size=group_size,
        rng=forward.rng,
        create_graph=scalar.create_graph,
        walk=scalar.walk,
        mixed_calls=scalar.find_mixed_calls(),
    )
    return GroupNorms(sq_norms, sizes)


def _finite_difference_norms(
    forward: _Pass,
    scalar: _ScalarGradients,
    term: ParamTerm,
    criterion: Criterion,
    y: Any,
    parameters: Mapping[str, Tensor],
    known: finite_difference.KnownGradient | None,
) -> Tensor:
    """‖∇_θ mean_{i ∈ group} f_i‖: (groups,). Groups smaller than the batch get forward passes of their own.

    `known` is mean_i f_i of the whole batch, if its gradient is there already.
    """
    model, batch_size = forward.model, scalar.f.shape[0]
    group_size = term.group_size(batch_size)
    if group_size == batch_size:
        whole = known or finite_difference.with_known_gradient(scalar.f.mean(), forward.x)
        groups = [(forward.x, whole, scalar.function, forward.rng, forward.buffers)]
    else:
        param_norms.check_rows((forward.x, y), batch_size)
        groups = []
        for start in range(0, batch_size, group_size):
            take_rows = itemgetter(slice(start, start + group_size))
            x_rows, y_rows = map_tensors(forward.x, take_rows), map_tensors(y, take_rows)
            rng, function = RngState.capture(), term.scalar(criterion, y_rows)
            loss = call_with(model, {}, x_rows, then=function).mean()
            groups.append((x_rows, finite_difference.with_known_gradient(loss, x_rows), function, rng, None))
    norms = [
        finite_difference.param_norm(
            model,
            x,
            known.loss,
            known.of(parameters),
            function,
            parameters,
            scheme=term.scheme,
            step=term.step,
            replay=rng.replayed,
            buffers=buffers,
            create_graph=scalar.create_graph,
        )
        for x, known, function, rng, buffers in groups
    ]
    return torch.stack(norms)


def versions_of(x: Any) -> tuple[int, ...]:
    """How often each tensor was changed in place; tensors made in inference mode do not count."""
    return tuple([tensor._version for tensor in tensors_of(x) if not tensor.is_inference()])


def check_unchanged(x: Any, versions: tuple[int, ...]) -> None:
    """A finite difference needs the x that the forward pass started from."""
    if versions != versions_of(x):
        raise RuntimeError(
            "the model changes one of its inputs in place (`x += …`), so that a finite difference would compare its "
            "values at two different inputs: replace the operation by an ordinary one (`x = x + …`)"
        )


def scalar_key(term: Term, criterion: Criterion) -> Any:
    """Equal for terms of the same f."""
    return _source_key(term.of if isinstance(term, InputTerm) and term.of != "loss" else criterion.source)


def _source_key(source: Any) -> Any:
    return source if isinstance(source, Hashable) else id(source)  # a criterion may be a dataclass


def needs_deltas(term: Term) -> bool:
    """Whether the term is computed from the layers' output gradients."""
    return isinstance(term, ParamTerm) and term.method == "exact" and term.over != "batch"


def check_call(model: nn.Module, terms: Sequence[Term]) -> list[dict[str, nn.Parameter]]:
    """Refuse what cannot be right before any forward pass; for every term, the parameters that count."""
    _checks.check_model(model)
    _checks.check_grad_enabled()
    if terms:
        _checks.check_not_static(model)
    modules = dict(model.named_modules())
    exact = next((term.method for term in terms if term.method != "finite_difference"), None)
    if exact is not None:
        if not runs_eagerly():
            _checks.check_not_compiled(modules.values(), exact)
        _checks.warn_of_wrong_second_derivatives(modules)
    apart = next((_quantity(term) for term in terms if isinstance(term, InputTerm) or term.over != "batch"), None)
    if apart is not None:
        _checks.check_none_mixes_samples(modules, apart)
    chosen = [select_parameters(model, term.parameters) if isinstance(term, ParamTerm) else {} for term in terms]
    for term, parameters in zip(terms, chosen, strict=True):
        if term.method == "finite_difference":
            _checks.check_leaves(parameters)
    return chosen


def _quantity(term: Term) -> str:
    return "the input penalty" if isinstance(term, InputTerm) else f"the parameter penalty over={term.over!r}"
