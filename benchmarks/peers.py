"""The same jobs the way they are usually done: autograd by hand, SAM, torch.func, BackPACK, Opacus."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from straight_line import scaled_directions
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from workload import Workload


class UnsupportedJobError(Exception):
    """Why a peer has no figure for a job."""


# ---- autograd by hand ----------------------------------------------------------------------------------------------


def double_backprop_input_step(work: Workload, weight: float) -> Tensor:
    """R_x by differentiating a gradient."""
    work.model.zero_grad()
    x = work.x.detach().requires_grad_()
    f = F.cross_entropy(work.model(x), work.y, reduction="none")
    (gradient,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    penalty = gradient.square().sum(1).mean()
    (f.mean() + weight * penalty).backward(inputs=list(work.model.parameters()))  # nobody needs x.grad
    return penalty.detach()


def double_backprop_batch_step(work: Workload, weight: float) -> Tensor:
    """‖∇_θ L‖² by differentiating a gradient."""
    work.model.zero_grad()
    loss = F.cross_entropy(work.model(work.x), work.y)
    gradients = torch.autograd.grad(loss, list(work.model.parameters()), create_graph=True)
    penalty = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    (loss + weight * penalty).backward()
    return penalty.detach()


def sam_step(work: Workload, rho: float) -> Tensor:
    """Sharpness-aware minimisation: the gradient at θ + ρ g/‖g‖; returns ‖g‖."""
    model = work.model
    model.zero_grad()
    F.cross_entropy(model(work.x), work.y).backward()
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        moves = [(p, p.grad * (rho / norm)) for p in model.parameters() if p.grad is not None]
        for parameter, move in moves:
            parameter.add_(move)
    model.zero_grad()
    F.cross_entropy(model(work.x), work.y).backward()
    with torch.no_grad():
        for parameter, move in moves:
            parameter.sub_(move)
    return norm


def jacobian_regularizer_step(work: Workload, weight: float, generator: torch.Generator) -> Tensor:
    """One random projection of the Jacobian (Hoffman, Roberts and Yaida 2019, algorithm 1, without its factor ½)."""
    work.model.zero_grad()
    x = work.x.detach().requires_grad_()
    logits = work.model(x)
    directions = scaled_directions(logits, generator)
    (gradient,) = torch.autograd.grad(logits, x, directions, create_graph=True)
    penalty = gradient.square().sum() / len(x)
    (F.cross_entropy(logits, work.y) + weight * penalty).backward(inputs=list(work.model.parameters()))
    return penalty.detach()


# ---- torch.func ----------------------------------------------------------------------------------------------------


def vmap_sample_norms(work: Workload) -> Tensor:
    """‖∇_θ f_i‖² from one gradient per sample."""

    def sample_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(work.model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    gradients = vmap(grad(sample_loss), (None, 0, 0))(dict(work.model.named_parameters()), work.x, work.y)
    return torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients.values()]).sum(0)


def vmap_norms_only(work: Workload) -> Tensor:
    """The same without a graph."""
    with torch.no_grad():
        return vmap_sample_norms(work)


def vmap_param_step(work: Workload, weight: float) -> Tensor:
    """R_θ over samples from one differentiable gradient per sample."""
    work.model.zero_grad()
    penalty = vmap_sample_norms(work).mean()
    (F.cross_entropy(work.model(work.x), work.y) + weight * penalty).backward()
    return penalty.detach()


# ---- BackPACK ------------------------------------------------------------------------------------------------------


class BackpackBatchL2:
    """BackPACK's ``batch_l2``: squared norms of the gradients of f_i / B, beside a backward pass."""

    def __init__(self, work: Workload) -> None:
        try:
            from backpack import backpack, extend, extensions
        except ImportError as error:
            raise UnsupportedJobError("not installed: pip install backpack-for-pytorch") from error
        self.collecting = lambda: backpack(extensions.BatchL2Grad())
        self.work = work
        self.model = extend(work.model)
        self.criterion = extend(nn.CrossEntropyLoss())

    def norms_and_step(self) -> Tensor:
        """‖∇_θ f_i‖², and ∇_θ of the mean loss in ``.grad``."""
        self.model.zero_grad()
        with self.collecting():
            self.criterion(self.model(self.work.x), self.work.y).backward()
        return self._sq_norms()

    def param_step(self, weight: float) -> Tensor:
        """R_θ over samples: ``batch_l2`` carries a graph after ``backward(create_graph=True)``."""
        self.model.zero_grad()
        with self.collecting(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*backward\\(\\) with create_graph=True")
            self.criterion(self.model(self.work.x), self.work.y).backward(create_graph=True)
        for parameter in self.model.parameters():  # keep ∇L, but not the graph that leads to it
            assert parameter.grad is not None
            parameter.grad = parameter.grad.detach()
        penalty = self._sq_norms().mean()
        (weight * penalty).backward()
        return penalty.detach()

    def _sq_norms(self) -> Tensor:
        parts = [getattr(parameter, "batch_l2") for parameter in self.model.parameters()]
        return torch.stack(parts).sum(0) * len(self.work.x) ** 2


# ---- Opacus --------------------------------------------------------------------------------------------------------


class OpacusGhostNorms:
    """Opacus' ghost clipping: norms of per-sample gradients without the gradients, beside a backward pass."""

    def __init__(self, work: Workload) -> None:
        try:
            from opacus.grad_sample import GradSampleModuleFastGradientClipping
        except ImportError as error:
            raise UnsupportedJobError("not installed: pip install opacus") from error
        self.work = work
        self.model = GradSampleModuleFastGradientClipping(work.model, loss_reduction="mean")

    def norms_and_step(self) -> Tensor:
        """‖∇_θ f_i‖², and ∇_θ of the mean loss in ``.grad``."""
        self.model.zero_grad()
        F.cross_entropy(self.model(self.work.x), self.work.y).backward()
        return self.model.get_norm_sample().square()

    def check_differentiable(self) -> None:
        """Whether the norms carry a graph."""
        self.model.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*backward\\(\\) with create_graph=True")
            F.cross_entropy(self.model(self.work.x), self.work.y).backward(create_graph=True)
        if not self.model.get_norm_sample().requires_grad:
            raise UnsupportedJobError("its norms carry no graph, so they cannot be penalised")
