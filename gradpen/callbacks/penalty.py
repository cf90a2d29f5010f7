"""A gradient penalty for a LightningModule that nobody edits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from gradpen import _checks
from gradpen._numerics import divide_or_zero
from gradpen.callbacks._batch import Getter, find_model, input_place, split_batch
from gradpen.callbacks._lightning import Callback
from gradpen.evaluation import evaluate_loss_terms
from gradpen.penalties import GradPenalty
from gradpen.recording import (
    CallRecorder,
    InputGate,
    Recording,
    float_tensors,
    in_place_explained,
    requiring_grad,
    tensors_of,
)
from gradpen.terms import GroupNorms, InputTerm

Due = list[tuple[GradPenalty, float]]  # the penalties of one step, and what each R is multiplied by


class GradPenaltyCallback(Callback):
    r"""Adds gradient penalties to the loss that ``training_step`` returns.

    .. math:: \text{loss} \leftarrow \text{loss} + \sum_k \text{weight}_k R_k

    The penalties are computed from the graph of that very loss: there is no second forward pass. ``training_step`` is
    wrapped while ``fit`` runs and put back afterwards, also after an exception or Ctrl-C.

    The loss is taken for the mean (or the sum, ``reduction="sum"``) over the samples of f_i, where f_i depends on sample i
    alone. With token losses averaged over what ``ignore_index`` leaves, f_i is sample i's share of that mean, times the
    batch size. The input is x as it is in the batch, one sample a row (dimension 0), before anything that ``training_step``
    does to it, and that must not be in place.

    A *step* is an optimiser step, the trainer's ``global_step``: weight schedules, ``every_n_steps`` and ``warmup_steps``
    count these, so all micro-batches of one step, and all evaluations of one LBFGS step, are penalised alike, and a resumed
    run goes on where it stopped. Under gradient accumulation penalties of single samples equal those of the big batch;
    ``over="batch"`` is the mean over micro-batches. Data-parallel processes are like micro-batches: the per-sample penalties
    equal those of the whole batch, and ``over="batch"`` is the mean of the processes' penalties, which differs from that of
    the whole batch. Under automatic mixed precision the penalties are those of the loss before it is scaled.

    While the module is in eval mode (frozen statistics), no step is left out, and every weight counts as it is.

    Logged are ``penalty/<name>``, the unweighted R, and ``penalty/share_of_loss``, Σ weight·R over the whole loss.

    Args:
        *given: `InputGradPenalty` and `ParamGradPenalty` with ``method="exact"``, of different names; also
            ``InputGradPenalty(of="output")`` with "exact" or "projection". Parameters are named as in the LightningModule.
        penalties: the same as a list, for configuration files.
        reduction: "mean" or "sum": how the module's loss is made from the losses of the samples.
        warmup_steps: raise all weights linearly from 0 over so many optimiser steps.
        inputs: which part of a batch is x: key, index or callable; found if the batch is (x, y) or an ordinary dict.
        model: which part of the module maps x to the output: name, callable or module; needed for ``of="output"`` if the
            module has no ``forward`` and several children.
        sync_dist: log the mean over processes instead of the first one's value, as in ``LightningModule.log``.

    Raises:
        ValueError: on penalties that need a forward pass of their own, or of the same name.
        RuntimeError: at the start of training, under manual optimisation, for a compiled module, one that fetches its own
            batches (``dataloader_iter``), a second `GradPenaltyCallback`, or a strategy that shards parameters; during
            training, if ``training_step`` returns no loss, the loss does not depend on the input, or a parameter has no
            closed form.
        TypeError: during training, if the batch has no floating-point input.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from gradpen import InputGradPenalty, ParamGradPenalty
        >>> from gradpen.callbacks import GradPenaltyCallback
        >>> callback = GradPenaltyCallback(InputGradPenalty(0.1), ParamGradPenalty(0.01), warmup_steps=100)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

    Source:
        Zhao, Zhang and Hu, "When will gradient regularization be harmful?" (2024, arXiv 2406.09723) for the warm-up of the
        weight, their λ-warmup: without it the penalty can spoil the statistics of adaptive optimisers early on.
    """

    def __init__(
        self,
        *given: GradPenalty,
        penalties: Sequence[GradPenalty] = (),
        reduction: str = "mean",
        warmup_steps: int = 0,
        inputs: Getter = None,
        model: str | Callable[[nn.Module], nn.Module] | nn.Module | None = None,
        sync_dist: bool = False,
    ) -> None:
        super().__init__()
        self.penalties = [*given, *penalties]
        if not self.penalties:
            raise ValueError("expected at least one penalty, such as InputGradPenalty(0.1), got none")
        for penalty in self.penalties:
            _check_penalty(penalty)
        _checks.check_names_unique([penalty.name for penalty in self.penalties])
        _checks.check_choice("reduction", reduction, ("mean", "sum"))
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"warmup_steps must be an int >= 0, got {warmup_steps!r}")
        self.reduction = reduction
        self.warmup_steps = warmup_steps
        self.inputs = inputs
        self.model = model
        self.sync_dist = sync_dist
        self._put_back: Callable[[], None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap ``training_step`` before searches for a learning rate or a batch size, which run without callbacks."""
        if stage == "fit":
            self._wrap(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``training_step`` as it is now: hooks of the module may have changed it since `setup`."""
        self._wrap(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put ``training_step`` back."""
        self._unwrap()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put ``training_step`` back, also after Ctrl-C."""
        self._unwrap()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put ``training_step`` back."""
        self._unwrap()

    def __getstate__(self) -> dict[str, Any]:
        """A copy made during ``fit`` has wrapped nothing, so it puts nothing back."""
        return vars(self) | {"_put_back": None}

    def _wrap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unwrap()
        _check_run(trainer, pl_module)
        attributes = vars(pl_module)
        own = attributes.get("training_step")
        penalized = _PenalizedStep(self, trainer, pl_module)

        def put_back() -> None:
            penalized.is_on = False
            if attributes.get("training_step") is not penalized:  # somebody put another one in its place
                return
            if own is None:
                del attributes["training_step"]
            else:
                attributes["training_step"] = own

        attributes["training_step"] = penalized
        self._put_back = put_back

    def _unwrap(self) -> None:
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    def _penalized(self, trainer: Trainer, pl_module: LightningModule, step: Callable[[Any], Any], batch: Any) -> Any:
        """What ``training_step`` returns, with the penalties added to its loss."""
        if not trainer.training:  # a validation step may call it
            return step(batch)
        due = self._due(trainer.global_step, pl_module)
        if not due:
            return step(batch)
        terms = [penalty.term for penalty, _ in due]
        fed, recording = batch, Recording(None, [])
        if any(isinstance(term, InputTerm) for term in terms):
            fed, recording = _with_input_gradients(batch, self.inputs)
        batch_size = _batch_size(recording.inputs, None) if recording.inputs else _batch_size(batch, self.inputs)
        if any(isinstance(term, InputTerm) or term.over != "batch" for term in terms):
            _check_samples_come_first(fed, recording.inputs)
        with (
            _outputs_of(self._model_of(pl_module)) as outputs,
            CallRecorder(recording.gate) as recorder,
            in_place_explained(recording.inputs, "training_step, or the model,"),
        ):
            returned = step(fed)
        if any(isinstance(term, InputTerm) and term.of == "output" for term in terms):
            _check_called_once(outputs)
        recording.is_hooked = recorder.is_hooked
        recording.calls, recording.output = recorder.calls, outputs[0] if len(outputs) == 1 else outputs
        loss = _loss_of(returned)
        norms = evaluate_loss_terms(pl_module, loss, recording, terms, batch_size=batch_size, reduction=self.reduction)
        recording.gate.closed = True
        penalized, values = _add_penalties(loss, due, norms)
        pl_module.log_dict(values, batch_size=batch_size, sync_dist=self.sync_dist)
        return {**returned, "loss": penalized} if isinstance(returned, Mapping) else penalized

    def _due(self, step: int, pl_module: LightningModule) -> Due:
        """The penalties of an optimiser step with their factors."""
        ramp = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        due = []
        for penalty in self.penalties:
            penalty.num_calls = step  # micro-batches and line searches are no steps
            factor = penalty.advance(pl_module)
            if factor is not None:
                due.append((penalty, ramp * factor))
        return due

    def _model_of(self, pl_module: LightningModule) -> nn.Module | None:
        """The part whose output shows which rows are samples; None if it is neither given nor evident."""
        needs_output = any(isinstance(p.term, InputTerm) and p.term.of == "output" for p in self.penalties)
        if self.model is None and not needs_output:
            try:
                return find_model(pl_module, None)
            except ValueError:  # the rows are then checked by their shapes
                return None
        return find_model(pl_module, self.model)


class _PenalizedStep:
    """``training_step`` with penalties. Copies of the module, pickled or not, have the step that it had before."""

    def __init__(self, callback: GradPenaltyCallback, trainer: Trainer, pl_module: LightningModule) -> None:
        step = pl_module.training_step
        functools.update_wrapper(self, step)
        # Lightning looks behind one decorator for the signature: a step that has one of its own must stay as it was seen
        self.__wrapped__ = getattr(step, "__wrapped__", step)
        self.__code__ = getattr(self.__wrapped__, "__code__", None)  # by which Lightning tells an override
        self._callback, self._trainer, self._module, self._step = callback, trainer, pl_module, step
        self.is_on = True  # one that was taken off may still be called by what somebody wrapped around it

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """One step."""

        def step(fed: Any) -> Any:
            return self._step(fed, *args, **kwargs)

        if not self.is_on:
            return step(batch)
        return self._callback._penalized(self._trainer, self._module, step, batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._step, memo)

    def __reduce__(self) -> Any:
        return _same, (self._step,)


def _same(value: Any) -> Any:
    return value


def _add_penalties(loss: Tensor, due: Due, all_norms: Sequence[GroupNorms]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with its penalties, and what is logged."""
    values, penalized, share = {}, loss, loss.new_zeros(())
    for (penalty, factor), norms in zip(due, all_norms, strict=True):
        value = penalty.reduce(norms)
        penalized = penalized + factor * value
        share = share + factor * value.detach()
        values[f"penalty/{penalty.name}"] = value.detach()
    values["penalty/share_of_loss"] = divide_or_zero(share, penalized.detach())
    return penalized, values


def _check_run(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse, before the first step, runs in which a penalty would be wrong or fail later."""
    if not pl_module.automatic_optimization:
        raise RuntimeError(
            "GradPenaltyCallback adds to the loss that training_step returns, and under manual optimisation (automatic_"
            "optimization=False) that loss is not used: call PenalizedLoss inside training_step instead"
        )
    callbacks: list[Any] = getattr(trainer, "callbacks")
    if sum(isinstance(callback, GradPenaltyCallback) for callback in callbacks) > 1:
        raise RuntimeError(
            "expected one GradPenaltyCallback, got several: the second would penalise the gradients of the first one's "
            "penalties. Give all penalties to one: GradPenaltyCallback(InputGradPenalty(…), ParamGradPenalty(…))"
        )
    strategy = type(trainer.strategy).__name__
    if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
        raise RuntimeError(
            f"GradPenaltyCallback differentiates a gradient, which is not supported through the sharded parameters of "
            f'{strategy}: use strategy="ddp" or a single device'
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise RuntimeError(
            "GradPenaltyCallback has to see the batch, and training_step(dataloader_iter) fetches it by itself: take "
            "training_step(batch, batch_idx), or call PenalizedLoss inside training_step"
        )
    compiled = getattr(pl_module, "_compiler_ctx", None) is not None
    if compiled or any(_checks.is_compiled(module) for module in pl_module.modules()):
        raise RuntimeError(
            "GradPenaltyCallback differentiates a gradient, and PyTorch cannot do that through a module compiled with torch."
            'compile: fit the original module, or call PenalizedLoss with penalties of method="finite_difference" inside '
            "training_step"
        )


def _check_penalty(penalty: object) -> None:
    if not isinstance(penalty, GradPenalty):
        raise TypeError(f"expected InputGradPenalty or ParamGradPenalty objects, got {type(penalty).__name__}")
    term = penalty.term
    if term.method == "finite_difference":
        raise ValueError(
            f'penalty {penalty.name!r} has method="finite_difference", which needs a second forward pass: call '
            'PenalizedLoss in training_step, or use method="exact"'
        )
    if isinstance(term, InputTerm) and callable(term.of):
        raise ValueError(
            f"penalty {penalty.name!r} is of a scalar of its own (of=callable), and the callback knows only the loss and "
            'the output: call PenalizedLoss in training_step, or use of="loss" or of="output"'
        )
    if penalty.criterion is not None:
        raise ValueError(
            f"penalty {penalty.name!r} has a criterion of its own, and the callback penalises the loss that training_step "
            "returns: leave criterion out"
        )


def _with_input_gradients(batch: Any, inputs: Getter) -> tuple[Any, Recording]:
    """The batch with floating-point inputs that require grad in place of x, and a recording that starts from these."""
    x, _ = split_batch(batch, inputs, targets=lambda _: None)
    place = input_place(batch, inputs)
    replaced = {id(tensor): requiring_grad(tensor) for tensor in float_tensors(x)}
    if not replaced:
        raise TypeError(
            "expected a floating-point input in the batch to penalise the gradient of, got "
            f"{', '.join(str(tensor.dtype) for tensor in tensors_of(x)) or type(x).__name__}: say where it is with inputs=…"
            ", or use ParamGradPenalty"
        )
    seen: set[int] = set()

    def replace(tensor: Tensor) -> Tensor:
        seen.add(id(tensor))
        return replaced.get(id(tensor), tensor)

    known = place is not None and isinstance(batch, (tuple, list, MutableMapping))
    fed = _with_item(batch, place, x, replace) if known else apply_to_collection(batch, Tensor, replace)
    if not seen >= set(replaced):
        raise TypeError(
            "expected the input to be an item of a batch of tuples, lists, dicts and dataclasses, so that an alias that "
            f"requires grad can take its place, got a batch of type {type(batch).__name__}: let the collate function return "
            "such a batch, or call PenalizedLoss inside training_step"
        )
    gate = InputGate([alias for given, alias in replaced.items() if id(alias) != given])
    return fed, Recording(None, list(replaced.values()), gate=gate)


def _with_item(batch: Any, place: Any, x: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """A batch like this one whose x is replaced, and nothing else: a target may be the very tensor that the input is."""
    replaced = apply_to_collection(x, Tensor, replace)
    if isinstance(batch, (tuple, list)):
        items = list(batch)
        items[place] = replaced
        make = getattr(type(batch), "_make", type(batch))  # that of named tuples
        return make(items)
    fed = copy.copy(batch)
    fed[place] = replaced
    return fed


def _loss_of(returned: Any) -> Tensor:
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise RuntimeError(
            "expected training_step to return the loss as a scalar tensor, or a dict with it under 'loss', got "
            f"{type(loss).__name__ if not isinstance(loss, Tensor) else f'shape {tuple(loss.shape)}'}: there is nothing "
            "to add a penalty to"
        )
    return loss


def _batch_size(batch: Any, inputs: Getter) -> int:
    """Rows of the first tensor of x if it is given, else of the batch, that has any."""
    x = batch if inputs is None else split_batch(batch, inputs, lambda _: None)[0]
    for tensor in _with_rows(x):
        return len(tensor)
    raise TypeError(
        f"expected a batch with tensors of shape (B, …), got {type(batch).__name__}: say where the input is with inputs=…"
    )


def _tensors_in(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def _with_rows(batch: Any) -> list[Tensor]:
    """The tensors of a batch that have a dimension 0."""
    return [tensor for tensor in _tensors_in(batch) if tensor.dim() > 0]


def _check_samples_come_first(batch: Any, inputs: Sequence[Tensor]) -> None:
    """The rows of an input (time, B, …) among targets (B, …), or of a single sample, would be taken for samples.

    Args:
        batch: as ``training_step`` gets it.
        inputs: what is x in it; () if that is not known, which is then its first tensor with rows.
    """
    tensors = _tensors_in(batch)
    inputs = inputs or _with_rows(tensors)[:1]
    known = {id(tensor) for tensor in inputs}
    shapes = [tensor.shape for tensor in inputs if tensor.dim() > 0]
    beside = [tensor.shape for tensor in tensors if id(tensor) not in known]
    if not (shapes and beside):
        return
    expected = (
        f"expected one sample in each row (dimension 0) of the input, got an input of shape {tuple(shapes[0])}, while"
    )
    if not any(beside):
        raise ValueError(
            f"{expected} all else in the batch is single numbers: let the data loader make batches, also of one sample"
        )
    if shapes[0][:1] != shapes[0][1:2] and all(shape[:1] == shapes[0][1:2] for shape in beside if shape):
        raise ValueError(
            f"{expected} all else in the batch has {shapes[0][1]} rows: let the collate function put the samples first, "
            "and training_step transpose them if the model wants them second"
        )


@contextmanager
def _outputs_of(model: nn.Module | None) -> Iterator[list[Any]]:
    """Collects what the model's calls within the block return."""
    outputs: list[Any] = []
    if model is None:
        yield outputs
        return
    handle = model.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _check_called_once(outputs: Sequence[Any]) -> None:
    """The Jacobian is that of one output."""
    if len(outputs) != 1:
        raise RuntimeError(
            f'of="output" expects one call of the model in training_step, got {len(outputs)}: say which part of the module '
            "maps x to the output with model=…"
        )
