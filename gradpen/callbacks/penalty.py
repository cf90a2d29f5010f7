"""A gradient penalty for a LightningModule that nobody edits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from gradpen import _checks
from gradpen.callbacks._batch import Getter, find_model, split_batch
from gradpen.callbacks._lightning import Callback
from gradpen.evaluation import evaluate_loss_terms
from gradpen.penalties import GradPenalty
from gradpen.recording import CallRecorder, Recording, float_tensors, requiring_grad, tensors_of
from gradpen.terms import InputTerm


class GradPenaltyCallback(Callback):
    r"""Adds gradient penalties to the loss that ``training_step`` returns.

    .. math:: \text{loss} \leftarrow \text{loss} + \sum_k \text{weight}_k R_k

    The penalties are computed from the graph of that very loss: there is no second forward pass. ``training_step`` is
    wrapped while ``fit`` runs and put back afterwards, also after an exception. Under gradient accumulation every
    micro-batch is penalised like a batch of its own and averaged as the loss is; under automatic mixed precision the
    penalties see unscaled gradients. With data-parallel strategies the per-sample penalties equal those of the whole
    batch, since they are means over samples; ``over="batch"`` is then the mean of the processes' penalties, which
    differs from that of the whole batch.

    Logged are ``penalty/<name>``, the unweighted R, and ``penalty/share_of_loss``, Σ weight·R over the whole loss.

    Args:
        *given: `InputGradPenalty` and `ParamGradPenalty` with ``method="exact"``, of different names; also
            ``InputGradPenalty(of="output")`` with "exact" or "projection".
        penalties: the same as a list, for configuration files.
        reduction: "mean" or "sum": how the module's loss is made from the losses of the samples.
        warmup_steps: raise all weights linearly from 0 over so many optimiser steps.
        inputs: which part of a batch is x: key, index or callable; found if the batch is (x, y) or an ordinary dict.
        model: which part of the module maps x to the output: name, callable or module; needed for ``of="output"`` if the
            module has no ``forward`` and several children.

    Raises:
        ValueError: on penalties that need a forward pass of their own, or of the same name.
        RuntimeError: at the start of training under manual optimisation; during training if ``training_step`` returns no
            loss, or the loss does not depend on the input.
        TypeError: during training, if the batch has no floating-point input.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from gradpen import InputGradPenalty, ParamGradPenalty
        >>> from gradpen.callbacks import GradPenaltyCallback
        >>> callback = GradPenaltyCallback(InputGradPenalty(0.1), ParamGradPenalty(0.01), warmup_steps=100)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

    Source:
        Warm-up: "Gradient regularization and learning-rate warm-up interact" is studied in arXiv 2406.09723.
    """

    def __init__(
        self,
        *given: GradPenalty,
        penalties: Sequence[GradPenalty] = (),
        reduction: str = "mean",
        warmup_steps: int = 0,
        inputs: Getter = None,
        model: str | Callable[[nn.Module], nn.Module] | nn.Module | None = None,
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
        self._put_back: Callable[[], None] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``training_step``."""
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "GradPenaltyCallback adds to the loss that training_step returns, and under manual optimisation (automatic_"
                "optimization=False) that loss is not used: call PenalizedLoss inside training_step instead"
            )
        self._unwrap()
        own = pl_module.__dict__.get("training_step")
        step = pl_module.training_step

        @functools.wraps(step)
        def penalized_step(*args: Any, **kwargs: Any) -> Any:
            return self._penalized(trainer, pl_module, step, args, kwargs)

        def put_back() -> None:
            if own is None:
                pl_module.__dict__.pop("training_step", None)
            else:
                pl_module.__dict__["training_step"] = own

        pl_module.__dict__["training_step"] = penalized_step
        self._put_back = put_back

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put ``training_step`` back."""
        self._unwrap()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put ``training_step`` back, also after Ctrl-C."""
        self._unwrap()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put ``training_step`` back."""
        self._unwrap()

    def state_dict(self) -> dict[str, Any]:
        """The penalties' step counters."""
        return {penalty.name: penalty.get_extra_state() for penalty in self.penalties}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the step counters back."""
        for penalty in self.penalties:
            penalty.set_extra_state(state_dict[penalty.name])

    def _unwrap(self) -> None:
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    def _penalized(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What ``training_step`` returns, with the penalties added to its loss."""
        factors = [penalty.advance(pl_module) for penalty in self.penalties]
        due = [(penalty, factor) for penalty, factor in zip(self.penalties, factors, strict=True) if factor is not None]
        if not due:
            return step(*args, **kwargs)
        batch = kwargs["batch"] if "batch" in kwargs else args[0]
        inputs: list[Tensor] = []
        if any(isinstance(penalty.term, InputTerm) for penalty, _ in due):
            batch, inputs = _with_input_gradients(batch, self.inputs)
        args, kwargs = (args, {**kwargs, "batch": batch}) if "batch" in kwargs else ((batch, *args[1:]), kwargs)
        recording = Recording(None, inputs)
        with _output_kept(self._model_of(pl_module), recording), CallRecorder() as recorder:
            returned = step(*args, **kwargs)
        recording.calls = recorder.calls
        loss = _loss_of(returned)
        batch_size = len(inputs[0]) if inputs else _batch_size(batch)
        terms = [penalty.term for penalty, _ in due]
        all_norms = evaluate_loss_terms(
            pl_module, loss, recording, terms, batch_size=batch_size, reduction=self.reduction
        )
        ramp = min(1.0, (trainer.global_step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        penalized, values = loss, {}
        for (penalty, factor), norms in zip(due, all_norms, strict=True):
            value = penalty.reduce(norms)
            values[f"penalty/{penalty.name}"] = value.detach()
            penalized = penalized + (ramp * factor) * value
        values["penalty/share_of_loss"] = ((penalized - loss) / penalized).detach()
        pl_module.log_dict(values, batch_size=batch_size)
        return {**returned, "loss": penalized} if isinstance(returned, Mapping) else penalized

    def _model_of(self, pl_module: LightningModule) -> nn.Module | None:
        """The part whose output shows which rows are samples; None if it is neither given nor evident."""
        needs_output = any(isinstance(p.term, InputTerm) and p.term.of == "output" for p in self.penalties)
        if self.model is None and not needs_output:
            try:
                return find_model(pl_module, None)
            except ValueError:  # the rows are then checked by their shapes
                return None
        return find_model(pl_module, self.model)


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


def _with_input_gradients(batch: Any, inputs: Getter) -> tuple[Any, list[Tensor]]:
    """The batch with floating-point inputs that require grad in place of x, and these inputs."""
    x, _ = split_batch(batch, inputs, targets=lambda _: None)
    replaced = {id(tensor): requiring_grad(tensor) for tensor in float_tensors(x)}
    if not replaced:
        raise TypeError(
            "expected a floating-point input in the batch to penalise the gradient of, got "
            f"{', '.join(str(tensor.dtype) for tensor in tensors_of(x)) or type(x).__name__}: say where it is with inputs=…"
            ", or use ParamGradPenalty"
        )
    with_gradients = apply_to_collection(batch, Tensor, lambda tensor: replaced.get(id(tensor), tensor))
    return with_gradients, list(replaced.values())


def _loss_of(returned: Any) -> Tensor:
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise RuntimeError(
            "expected training_step to return the loss as a scalar tensor, or a dict with it under 'loss', got "
            f"{type(returned).__name__ if not isinstance(loss, Tensor) else f'shape {tuple(loss.shape)}'}: there is nothing "
            "to add a penalty to"
        )
    return loss


def _batch_size(batch: Any) -> int:
    """Rows of the first tensor of a batch that has any."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    for tensor in found:
        if tensor.dim() > 0:
            return len(tensor)
    raise TypeError(f"expected a batch with tensors of shape (B, …), got {type(batch).__name__}")


@contextmanager
def _output_kept(model: nn.Module | None, recording: Recording) -> Iterator[None]:
    """Keep the output of the model's last call in the recording."""
    if model is None:
        yield
        return

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        recording.output = output

    handle = model.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
