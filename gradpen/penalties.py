"""The two penalties as losses, and the objective that computes everything from one forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpen import _checks, evaluation
from gradpen.criteria import Criterion, as_criterion
from gradpen.evaluation import Evaluation
from gradpen.known_gradients import with_gradients
from gradpen.recording import call_model, map_tensors, tensors_of
from gradpen.terms import GroupNorms, InputTerm, ParameterFilter, ParamTerm, Term

Weight = float | Callable[[int], float]


class GradPenalty(nn.Module):
    """What both penalties share: weight, schedule, reduction. Use `InputGradPenalty` or `ParamGradPenalty`."""

    term: Term

    def __init__(
        self,
        weight: Weight,
        *,
        criterion: Callable[..., Tensor] | None,
        squared: bool,
        every_n_steps: int,
        name: str,
    ) -> None:
        super().__init__()
        _checks.check_weight(weight)
        _checks.check_positive_int("every_n_steps", every_n_steps)
        self.weight = weight
        self.criterion = criterion
        self.squared = squared
        self.every_n_steps = every_n_steps
        self.name = name
        self.num_calls = 0
        self._criterion = as_criterion(F.cross_entropy if criterion is None else criterion)
        self._has_own_reduce = type(self).reduce not in (GradPenalty.reduce, InputGradPenalty.reduce)

    def forward(self, model: nn.Module, x: Any, y: Any = None) -> Tensor:
        """weight × R for one batch, to be added to any loss.

        Args:
            model: the module that is trained.
            x: input of shape (B, …), or a tuple or dict of inputs.
            y: target of shape (B, …), as the criterion takes it.

        Returns:
            A differentiable 0-dim tensor; a plain 0, for which nothing is computed, on the steps that ``every_n_steps``
            leaves out and where the weight is 0.
        """
        _checks.check_model(model)
        if torch.compiler.is_compiling():
            _traced().renew_criteria(self)
        factor = self.advance(model)
        if factor is None or factor == 0:
            return _zero(model, x)
        norms = _evaluate_terms(model, x, y, [(self.term, self.renewed_criterion())], [self.takes_mean]).norms[0]
        return factor * self.reduce(norms)

    def renewed_criterion(self) -> Criterion:
        """The criterion as it is now."""
        return self._criterion.renewed(F.cross_entropy if self.criterion is None else self.criterion)

    def advance(self, model: nn.Module) -> float | None:
        """Count one call; what R is to be multiplied by now, or None on a step that is left out.

        Calls on a model in eval mode are not counted, never left out, and weighted plainly.

        Raises:
            ValueError: if a weight schedule returns something that is no weight.
        """
        training = model.training
        if torch.compiler.is_compiling():
            return _traced().advance(self, training)
        is_left_out = training and self.num_calls % self.every_n_steps != 0
        factor = None if is_left_out and not callable(self.weight) else self.factor_now(training)
        if training:
            vars(self)["num_calls"] += 1  # setting an attribute of a module takes as long as a small kernel
        return factor

    def factor_now(self, training: bool) -> float | None:
        """What `advance` returns, given the mode that the model is in."""
        weight = self.weight(self.num_calls) if callable(self.weight) else self.weight
        _checks.check_weight(weight)
        if not training:
            return weight
        return weight * self.every_n_steps if self.num_calls % self.every_n_steps == 0 else None

    @property
    def takes_mean(self) -> bool:
        """Whether R is the mean of the squared norms, so that `reduce` does not need the single ones."""
        return self.squared and not self._has_own_reduce

    def reduce(self, norms: GroupNorms) -> Tensor:
        """R: the mean over samples of ‖·‖², or of ‖·‖."""
        if norms.values.dim() == 0:  # that mean already
            return norms.values
        values = norms.sq_norms if self.squared else norms.norms
        if norms.sizes is None:
            return values.mean()
        return (values * norms.sizes).sum() / norms.sizes.sum()

    def get_extra_state(self) -> dict[str, int]:
        """The step counter, so that schedules and lazy steps survive a resume."""
        return {"num_calls": self.num_calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Put the step counter back."""
        self.num_calls = int(state["num_calls"])

    def extra_repr(self) -> str:
        """The settings, as the constructor takes them."""
        own = {
            name: getattr(self, name) for name in ("weight", "squared", "target", "one_sided") if hasattr(self, name)
        }
        settings = {**own, **vars(self.term), "every_n_steps": self.every_n_steps, "name": self.name}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)


class InputGradPenalty(GradPenalty):
    r"""Penalty on the gradient of the loss with respect to the input.

    .. math:: R_x = \frac1B \sum_i \|\nabla_x f_i\|^2, \qquad \text{loss} = \text{data loss} + \text{weight} \cdot R_x

    Args:
        weight: number >= 0, or a callable of the step (the number of training-mode calls so far).
        of: "loss" (f_i is sample i's loss), "output" (:math:`\|J_i\|_F^2` over all outputs), or a callable
            (output, target) → (B,).
        criterion: gives f_i; default F.cross_entropy, or the objective's criterion within `PenalizedLoss`.
        method: "exact", "projection" (random output directions, unbiased, for ``of="output"``), or
            "finite_difference" (needs first derivatives only, so it works through compiled modules).
        num_projections: output directions per sample for "projection".
        scheme: "forward", "backward" or "central" for "finite_difference".
        step: length of the displacement of x for "finite_difference", in units of x.
        squared: mean of the squared norms, or of the norms (with derivative 0 at 0).
        target: if given, :math:`R = \frac1B \sum_i (\|\nabla_x f_i\| - \text{target})^2`, as in WGAN-GP.
        one_sided: penalise only norms above `target`.
        every_n_steps: lazy regularisation: compute the term on every n-th training-mode call, with n times the weight.
        name: key in `PenalizedOutput.penalties`.
        generator: where "projection" draws from.

    Raises:
        ValueError: on a weight that is negative or NaN, or an unknown option.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from gradpen import InputGradPenalty
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.randint(3, (5,))
        >>> penalty = InputGradPenalty(weight=0.1)
        >>> loss = F.cross_entropy(model(x), y) + penalty(model, x, y)
        >>> loss.backward()

    Source:
        Drucker and LeCun, "Improving generalization performance using double backpropagation" (1992); the norm
        target is that of Gulrajani et al., "Improved training of Wasserstein GANs" (2017, arXiv 1704.00028).
    """

    term: InputTerm

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        of: str | Callable[[Any, Any], Tensor] = "loss",
        criterion: Callable[..., Tensor] | None = None,
        method: str = "exact",
        num_projections: int = 1,
        scheme: str = "forward",
        step: float = 0.01,
        squared: bool = True,
        target: float | None = None,
        one_sided: bool = False,
        every_n_steps: int = 1,
        name: str = "input",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(weight, criterion=criterion, squared=squared, every_n_steps=every_n_steps, name=name)
        if target is not None:
            _checks.check_norm_target(target)
        if target is not None and not squared:
            raise ValueError(
                "target=… penalises the squared distance of the norm from it, which squared=False says nothing about: leave "
                "one of them out"
            )
        if one_sided and target is None:
            raise ValueError("one_sided=True penalises norms above a target, so it expects target=…, got None")
        self.term = InputTerm(of, method, num_projections, scheme, step, generator)
        self.target = target
        self.one_sided = one_sided

    @property
    def takes_mean(self) -> bool:
        """Whether R is the mean of the squared norms, so that `reduce` does not need the single ones."""
        return self.target is None and self.squared and not self._has_own_reduce

    def reduce(self, norms: GroupNorms) -> Tensor:
        """R: the mean over samples of ‖·‖², of ‖·‖, or of (‖·‖ − target)²."""
        if self.target is None:
            return super().reduce(norms)
        excess = norms.norms - self.target
        return (excess.clamp(min=0) if self.one_sided else excess).square().mean()


class ParamGradPenalty(GradPenalty):
    r"""Penalty on the gradient of the loss with respect to the parameters.

    .. math::
        R_\theta = \frac1B \sum_i \|\nabla_\theta f_i\|^2 \quad (\text{over="sample"}), \qquad
        R_\theta = \Big\|\nabla_\theta \frac1B \sum_i f_i\Big\|^2 \quad (\text{over="batch"})

    The first is the side of the inequality that bounds R_x; the second is implicit gradient regularisation. They differ
    by the trace of the gradient-noise covariance.

    With ``method="finite_difference"``, ``squared=False`` and ``over="batch"`` the gradient of data loss + penalty is
    :math:`(1-\alpha)\nabla L(\theta) + \alpha \nabla L(\theta + r\,g/\|g\|)` with r = `step` and α = weight / r; SAM is
    the special case α = 1, that is weight = step.

    Args:
        weight: number >= 0, or a callable of the step (the number of training-mode calls so far).
        over: "sample", "batch", or an int: micro-batches of that many consecutive samples (a smaller last one counts in
            proportion).
        criterion: gives f_i; default F.cross_entropy, or the objective's criterion within `PenalizedLoss`.
        method: "exact", or "finite_difference" (first derivatives only; meant for ``over="batch"``, since samples and
            micro-batches are done one after the other).
        scheme: "forward", "backward" or "central" for "finite_difference".
        step: length r of the displacement of θ along the gradient, ε = r/‖∇_θ L‖.
        squared: mean of the squared norms, or of the norms (with derivative 0 at 0).
        parameters: which parameters count: a callable (name, parameter) → bool, or glob patterns such as
            ``["*.weight"]``; default all that require grad.
        every_n_steps: lazy regularisation: compute the term on every n-th training-mode call, with n times the weight.
        name: key in `PenalizedOutput.penalties`.

    Raises:
        ValueError: on a weight that is negative or NaN, or an unknown option.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from gradpen import ParamGradPenalty
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.randint(3, (5,))
        >>> penalty = ParamGradPenalty(weight=0.01, over="sample")
        >>> loss = F.cross_entropy(model(x), y) + penalty(model, x, y)
        >>> loss.backward()

    Source:
        Su, "An inequality between the input gradient penalty and the parameter gradient penalty" (2021,
        kexue.fm/archives/8796) for "sample"; Barrett and Dherin, "Implicit gradient regularization" (2021, arXiv
        2009.11162) for "batch"; Zhao, Zhang and Hu, "Penalizing gradient norm for efficiently improving
        generalization in deep learning" (2022, arXiv 2202.03599) for ``squared=False`` and the α form.
    """

    term: ParamTerm

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        over: str | int = "sample",
        criterion: Callable[..., Tensor] | None = None,
        method: str = "exact",
        scheme: str = "forward",
        step: float = 0.01,
        squared: bool = True,
        parameters: ParameterFilter | None = None,
        every_n_steps: int = 1,
        name: str = "param",
    ) -> None:
        super().__init__(weight, criterion=criterion, squared=squared, every_n_steps=every_n_steps, name=name)
        self.term = ParamTerm(over, method, scheme, step, parameters)


class PenalizedOutput(NamedTuple):
    """What `PenalizedLoss` returns.

    Attributes:
        loss: data_loss + Σ weight · R, 0-dim: call ``backward()`` on it.
        data_loss: exactly ``criterion(output, y)``, the criterion of the model's output.
        penalties: name → the unweighted R, 0-dim; 0 on steps that ``every_n_steps`` leaves out. Differentiable unless
            all weights are 0.
        output: the model's output, and of wide dense layers on a CPU the same up to rounding: their products may add in
            another order. Penalties need not lead through it in the graph, nor through activations within the model: the
            derivative of the loss with respect to these is that of the data loss, or there is none, and hooks on nodes of
            the graph (``tensor.grad_fn.register_hook``) within the model need not run.
    """

    loss: Tensor
    data_loss: Tensor
    penalties: dict[str, Tensor]
    output: Any


class PenalizedLoss(nn.Module):
    r"""Data loss and gradient penalties from one forward pass.

    .. math:: \text{loss} = L(\theta) + \sum_k \text{weight}_k R_k

    Penalties of the same f share one backward graph. If the weights of all penalties are 0, their R is measured beside the
    training step, almost for free, and carries no graph.

    ``torch.compile(objective, fullgraph=True)`` works from torch 2.8 on; the model is an ordinary module. At each
    compilation the model is run once in eager mode on the batch at hand, to find out which parameters have a closed form
    and that row i of each layer belongs to sample i; that later batches of these shapes are laid out alike is assumed, as
    in eager mode.

    Args:
        criterion: the data loss: a function or module with a ``reduction`` argument, or a callable that returns one
            value per sample (its mean is then the data loss).
        *penalties: `InputGradPenalty` and `ParamGradPenalty`, of different names.

    Raises:
        ValueError: if two penalties have the same name.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.randint(3, (5,))
        >>> objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1), ParamGradPenalty(0.01))
        >>> out = objective(model, x, y)
        >>> out.loss.backward()
        >>> sorted(out.penalties)
        ['input', 'param']
    """

    def __init__(self, criterion: Callable[..., Tensor], *penalties: GradPenalty) -> None:
        super().__init__()
        if isinstance(criterion, GradPenalty):
            raise TypeError(
                f"expected the criterion of the data loss first, got {type(criterion).__name__}: "
                "PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1))"
            )
        for penalty in penalties:
            if not isinstance(penalty, GradPenalty):
                raise TypeError(
                    "expected InputGradPenalty or ParamGradPenalty objects after the criterion, got "
                    f"{type(penalty).__name__}"
                )
        _checks.check_names_unique([penalty.name for penalty in penalties])
        self.criterion = criterion
        self.penalties = nn.ModuleList(penalties)
        self._criterion = as_criterion(criterion)

    def renewed_criterion(self) -> Criterion:
        """The criterion as it is now."""
        return self._criterion.renewed(self.criterion)

    def forward(self, model: nn.Module, x: Any, y: Any = None) -> PenalizedOutput:
        """One forward pass, everything computed from it.

        Args:
            model: the module that is trained.
            x: input of shape (B, …), or a tuple or dict of inputs.
            y: target of shape (B, …), as the criterion takes it.
        """
        _checks.check_model(model)
        if torch.compiler.is_compiling():
            _traced().renew_criteria(self)
        penalties = self._penalties()
        factors = [penalty.advance(model) for penalty in penalties]
        if all(factor is None for factor in factors):
            output = call_model(model, x)
            data_loss = self.renewed_criterion().data_loss(output, y)
            return PenalizedOutput(_of_its_own(data_loss), data_loss, _zeros(penalties, data_loss), output)
        return self._penalised(model, x, y, factors)[0]

    def compiled(self, **options: Any) -> Callable[..., PenalizedOutput]:
        """The objective for training loops, compiled: `torch.compile` of what is worth it.

        What it returns is called as the objective is, ``(model, x, y) → PenalizedOutput``, and counts the same steps. There
        are three differences from ``torch.compile(objective)``. Of the result `loss` alone carries a graph; so the compiler
        makes no backward pass for anything else. Where a chain of dense layers is trained on a CPU under cross entropy, the
        gradients are computed together with the loss, and ``backward()`` hands them out. And a step on which
        ``every_n_steps`` leaves all penalties out runs in eager mode, where it is as fast on a CPU; if your plain steps gain
        by being compiled, as with CUDA graphs, compile the objective itself.

        Args:
            **options: as `torch.compile` takes them; ``fullgraph`` is True unless said otherwise.

        Raises:
            RuntimeError: if torch is older than 2.8.

        Example:
            >>> import torch, torch.nn.functional as F
            >>> from gradpen import InputGradPenalty, PenalizedLoss
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
            >>> objective = PenalizedLoss(F.cross_entropy, InputGradPenalty(0.1, every_n_steps=4)).compiled(backend="eager")
            >>> out = objective(model, torch.randn(5, 4), torch.randint(3, (5,)))
            >>> out.loss.backward()
            >>> out.loss.requires_grad, out.data_loss.requires_grad
            (True, False)
        """
        _traced().check_version()
        penalised = torch.compile(self._loss_alone, **{"fullgraph": True, **options})

        def objective(model: nn.Module, x: Any, y: Any = None) -> PenalizedOutput:
            _checks.check_model(model)
            penalties = self._penalties()
            factors = [penalty.advance(model) for penalty in penalties]
            if any(factor is not None for factor in factors):
                numbers = [None if factor is None else float(factor) for factor in factors]  # an int is a constant
                out, gradients, leaves = penalised(model, x, y, numbers, at_once=_traced().is_backward_pass_free())
                return PenalizedOutput(with_gradients(out[0], gradients, leaves), *out[1:]) if leaves else out
            output = call_model(model, x)
            loss = self.renewed_criterion().data_loss(output, y)
            data_loss = loss.detach().clone()
            return PenalizedOutput(loss, data_loss, _zeros(penalties, data_loss), map_tensors(output, Tensor.detach))

        return objective

    def _penalties(self) -> list[GradPenalty]:
        return [penalty for penalty in self.penalties if isinstance(penalty, GradPenalty)]

    def _loss_alone(
        self, model: nn.Module, x: Any, y: Any, factors: Sequence[float | None], *, at_once: bool
    ) -> tuple[PenalizedOutput, Sequence[Tensor], Sequence[Tensor]]:
        """`_penalised`, of which nothing but the loss can be differentiated, or nothing at all, its gradients being there.

        Gradients and loss in one graph need no activations to be kept in between, and one call less. On a GPU they are two:
        CUDA graphs write over what they have returned, and gradients stay.

        Returns:
            The result, ∂loss/∂leaf, and the leaves; none of them if the loss has a graph.
        """
        if torch.compiler.is_compiling():
            _traced().renew_criteria(self)
        (loss, *others), leaves = self._penalised(model, x, y, factors)
        others = map_tensors(others, Tensor.detach)
        at_once = at_once and model.training  # in eval mode who knows who wants them
        if not (at_once and leaves and all(leaf.is_cpu for leaf in leaves)):
            return PenalizedOutput(loss, *others), (), ()
        gradients, leaves = _traced().gradients_at_once(loss, leaves)
        return PenalizedOutput(loss.detach(), *others), gradients, leaves

    def _penalised(
        self, model: nn.Module, x: Any, y: Any, factors: Sequence[float | None]
    ) -> tuple[PenalizedOutput, Sequence[Tensor]]:
        """The objective on a step with a penalty, given what each is multiplied by now.

        Returns:
            The result, and the leaves that its loss depends on, if they are known to be all.
        """
        compiling = torch.compiler.is_compiling()
        penalties, criterion = self._penalties(), self.renewed_criterion()
        due = [(penalty, factor) for penalty, factor in zip(penalties, factors, strict=True) if factor is not None]
        terms = [
            (penalty.term, criterion if penalty.criterion is None else penalty.renewed_criterion())
            for penalty, _ in due
        ]
        means = [penalty.takes_mean for penalty, _ in due]
        weighted = any(factor != 0 for _, factor in due)
        evaluated = _evaluate_terms(model, x, y, terms, means, data=criterion, create_graph=weighted)
        data_loss = evaluated.data_loss
        if data_loss is None:
            data_loss = criterion.data_loss(evaluated.output, y)
        values, loss, norms, leaves = {}, data_loss, iter(evaluated.norms), evaluated.leaves
        for penalty, factor in zip(penalties, factors, strict=True):
            if factor is None:
                values[penalty.name] = data_loss.new_zeros(())
                continue
            found = next(norms)
            if leaves and factor != 0 and _depends_on_others(penalty, found):
                leaves = ()
            values[penalty.name] = penalty.reduce(found)
            if factor != 0:  # what does not count may be infinite
                term = values[penalty.name]
                # to a compiled graph alpha is a constant, a factor is not: setting `weight` anew costs no compilation
                loss = loss + factor * term if compiling else torch.add(loss, term, alpha=factor)
        if loss is data_loss:
            loss = _of_its_own(data_loss)
        return PenalizedOutput(loss, data_loss, values, evaluated.output), leaves


def _depends_on_others(penalty: GradPenalty, norms: GroupNorms) -> bool:
    """Whether R can perhaps be differentiated by more than its norms can be: by a `target` that is learned, say."""
    constant = GroupNorms(norms.values.detach(), norms.sizes, norms.are_squared)
    return penalty._has_own_reduce or penalty.reduce(constant).requires_grad


def _of_its_own(data_loss: Tensor) -> Tensor:
    """The same number as another tensor: `loss /= n` must leave the data loss alone. The compiler drops mere copies."""
    return data_loss.neg().neg() if torch.compiler.is_compiling() else data_loss.clone()


def _zeros(penalties: Sequence[GradPenalty], like: Tensor) -> dict[str, Tensor]:
    """R on a step that leaves all penalties out."""
    return {penalty.name: torch.zeros_like(like) for penalty in penalties}


def _evaluate_terms(
    model: nn.Module,
    x: Any,
    y: Any,
    terms: Sequence[tuple[Term, Criterion]],
    means: Sequence[bool],
    *,
    data: Criterion | None = None,
    create_graph: bool = True,
) -> Evaluation:
    if torch.compiler.is_compiling():
        return _traced().evaluate_terms(model, x, y, terms, means=means, data=data, create_graph=create_graph)
    return evaluation.evaluate_terms(model, x, y, terms, means=means, data=data, create_graph=create_graph)


def _traced() -> ModuleType:
    """Imported by the first compilation: it brings torch._dynamo along, which nobody needs who does not compile."""
    from gradpen import traced

    return traced


def _zero(model: nn.Module, x: Any) -> Tensor:
    """A zero that adds to a loss, on the device of the model or of the input."""
    for like in itertools.chain(model.parameters(), tensors_of(x)):  # torch 2.8 compiles no `next` with a default
        return torch.zeros((), device=like.device)
    return torch.zeros(())
