"""The grid: architectures, losses, batch sizes and dtypes as data.

Widths are small and several of them equal the batch size on purpose: what tells a batch from a token axis by its size
alone is found out here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

B = 5  # the usual batch size, also the number of tokens in the models below
CLASSES = 3


class Problem(NamedTuple):
    """A case made concrete."""

    model: nn.Module
    x: Any
    y: Any
    criterion: Callable[..., Tensor]


# ---- losses: what gradpen is given, and f_i written out for one row -------------------------------------------------


def cross_entropy_row(
    output: Tensor, target: Tensor, smoothing: float = 0.0, weight: Tensor | None = None, ignore: int = -100
) -> Tensor:
    """−log softmax of the target class, written out; (C,) or (C, T), averaged over T."""
    if output.dim() > 1:
        columns = zip(output.flatten(1).T, target.flatten(), strict=True)
        return torch.stack([cross_entropy_row(o, t, smoothing, weight, ignore) for o, t in columns]).mean()
    if int(target) == ignore:
        return 0.0 * output.sum()
    largest = output.max().detach()  # or exp overflows
    nll = ((output - largest).exp().sum().log() + largest - output) * (
        torch.ones_like(output) if weight is None else weight.to(output)
    )
    return (1 - smoothing) * nll[target] + smoothing * nll.mean()


def squared_error_row(output: Tensor, target: Tensor, mean: bool = True) -> Tensor:
    """Σ (output − target)², divided by the number of entries if `mean`."""
    total = sum((o - t) ** 2 for o, t in zip(output.flatten(), target.flatten(), strict=True))
    return total / output.numel() if mean else total


def binary_cross_entropy_row(output: Tensor, target: Tensor) -> Tensor:
    """Mean of log(1 + e^o) − t o."""
    return torch.stack(
        [(1 + o.exp()).log() - t * o for o, t in zip(output.flatten(), target.flatten(), strict=True)]
    ).mean()


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)


@dataclass(frozen=True)
class Loss:
    """A criterion and its hand-written row."""

    name: str
    criterion: Callable[..., Tensor]
    row: Callable[[Tensor, Any], Tensor]
    target: str  # "class", "classes" (one per position) or "like_output"


CROSS_ENTROPY = Loss("cross_entropy", F.cross_entropy, cross_entropy_row, "class")
POSITION_CROSS_ENTROPY = Loss("cross_entropy_per_position", F.cross_entropy, cross_entropy_row, "classes")
MSE = Loss("mse", F.mse_loss, squared_error_row, "like_output")

LOSSES = [
    CROSS_ENTROPY,
    MSE,
    Loss("cross_entropy_module", nn.CrossEntropyLoss(), cross_entropy_row, "class"),
    Loss(
        "smoothed_and_weighted_module",
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.2),
        partial(cross_entropy_row, smoothing=0.2, weight=CLASS_WEIGHTS),
        "class",
    ),
    Loss(
        "smoothed_and_weighted_partial",
        partial(F.cross_entropy, weight=CLASS_WEIGHTS, label_smoothing=0.2),
        partial(cross_entropy_row, smoothing=0.2, weight=CLASS_WEIGHTS),
        "class",
    ),
    Loss("cross_entropy_sum", nn.CrossEntropyLoss(reduction="sum"), cross_entropy_row, "class"),
    Loss("mse_sum", nn.MSELoss(reduction="sum"), partial(squared_error_row, mean=False), "like_output"),
    Loss(
        "kl_div_batchmean",
        nn.KLDivLoss(reduction="batchmean"),
        lambda o, t: (t * (t.log() - o)).sum(),
        "like_output",
    ),
    Loss("mse_none", nn.MSELoss(reduction="none"), squared_error_row, "like_output"),
    Loss("bce_with_logits", F.binary_cross_entropy_with_logits, binary_cross_entropy_row, "like_output"),
    Loss("bce_with_logits_module", nn.BCEWithLogitsLoss(), binary_cross_entropy_row, "like_output"),
    Loss(
        "own_without_reduction",
        lambda o, t: (o - t).pow(4).sum(1),
        lambda o, t: (o - t).pow(4).sum(),
        "like_output",
    ),
]
POSITION_LOSSES = [
    POSITION_CROSS_ENTROPY,
    Loss(
        "cross_entropy_ignore",
        partial(F.cross_entropy, ignore_index=1),
        partial(cross_entropy_row, ignore=1),
        "classes",
    ),
    Loss("mse_positions", F.mse_loss, squared_error_row, "like_output"),
    Loss(
        "mse_sum_positions",
        nn.MSELoss(reduction="sum"),
        partial(squared_error_row, mean=False),
        "like_output",
    ),
]


# ---- modules that a recorder of layers can get wrong -----------------------------------------------------------------


class Transpose(nn.Module):
    """(B, a, b) → (B, b, a)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Mean(nn.Module):
    """Mean over the tokens: (B, T, …) → (B, …)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Scale(nn.Module):
    """A parameter that no layer of torch knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).sin()


class UnitRows(nn.Module):
    """V → V/‖v_row‖ (torch's own weight_norm has a wrong second derivative: `gradgradcheck` fails on torch 2.15)."""

    def forward(self, v: Tensor) -> Tensor:
        return v / v.flatten(1).square().sum(1).sqrt().reshape(-1, *[1] * (v.dim() - 1))


def unit_rows(layer: nn.Module) -> nn.Module:
    """The layer with a parametrised weight."""
    return parametrize.register_parametrization(layer, "weight", UnitRows())


class Reused(nn.Module):
    """One dense layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh()).tanh())


class ReusedInTwoKinds(nn.Module):
    """One weight called as a dense layer and as a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(x).tanh()
        return self.head(F.conv1d(h.unsqueeze(2), self.shared.weight.unsqueeze(2)).squeeze(2))


class TiedAutoencoder(nn.Module):
    """Encoder W, decoder Wᵀ: one weight, one recorded call, two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).tanh(), self.encoder.weight.t())


class TiedByMatmul(nn.Module):
    """The second use is not even a call of a layer function."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).tanh() @ self.encoder.weight


class TiedEmbedding(nn.Module):
    """Language model whose head is its table."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=padding_idx)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).tanh()).transpose(1, 2)


class Residual(nn.Module):
    """x → inner(h) + h → head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).tanh()
        return self.head(h + self.inner(h).tanh())


class Sliced(nn.Module):
    """One parameter holds the weights of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 4, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(F.linear(x, self.weights[0]).tanh(), self.weights[1]).tanh())


class Functional(nn.Module):
    """Dense layers without an nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(5, 4))
        self.w2 = nn.Parameter(torch.randn(CLASSES, 5))
        self.b2 = nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w1).tanh(), weight=self.w2, bias=self.b2)


class TiedTable(nn.Module):
    """torch.embedding, whose padding row comes after the indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return (torch.embedding(self.table, tokens, 6).tanh() @ self.table.T).transpose(1, 2)


class BroadcastBias(nn.Module):
    """F.linear adds one bias to all outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.b = nn.Parameter(torch.randn(1))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.w, self.b).tanh())


class VectorWeight(nn.Module):
    """F.linear with a vector, which leaves no feature dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.v).tanh())


class Ensemble(nn.Module):
    """torch.vmap over members within the model."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.Parameter(torch.randn(2, 5, 4))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.vmap(partial(F.linear, x))(self.members).mean(0).tanh())


class Attention(nn.Module):
    """A small encoder block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head((x + self.attention(h, h, h, need_weights=False)[0]).mean(1))


class WithMathAttention(nn.Module):
    """Attention by the implementation that has second derivatives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(x)


class TokensFirst(nn.Module):
    """(B, T, d) → (T, B, d) inside: with T == B the shapes cannot tell the two axes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.dense(x.transpose(0, 1)).tanh())).mean(0)


class Positions(nn.Module):
    """A learned table of T rows goes through a dense layer of its own: with T == B it looks like a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(B, 4))
        self.encode = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.encode(self.table).tanh()).tanh().mean(1))


class Flattened(nn.Module):
    """Tokens and samples in one axis, (B·T, d), as many implementations have it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.dense(x.reshape(-1, 4)).tanh()
        return self.head(tokens.reshape(x.shape[0], -1, 4).mean(1))


class Reversed(nn.Module):
    """The batch is turned round inside and back again: rows and samples do not correspond."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(x.flip(0)).tanh().flip(0))


class ClassToken(nn.Module):
    """A parameter that is expanded over the batch before a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.dense = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(x.shape[0], 1, 4), x], 1)
        return self.head(self.dense(h).tanh().logsumexp(1))


class TwoInputs(nn.Module):
    """A float image, a float vector and integer tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(4, 4)
        self.table = nn.Embedding(6, 4, padding_idx=0)
        self.vector = nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, image: Tensor, vector: Tensor, tokens: Tensor) -> Tensor:
        return self.head((self.image(image) + self.vector(vector) * self.table(tokens).sum(1)).tanh())


class Masked(nn.Module):
    """Dropout whose mask is an input, so that an oracle can have the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.head(self.dense(x).relu() * keep / 0.5)


class Unused(nn.Module):
    """A layer that is called and has no influence on the output."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        return self.head(x.sin())


class Recurrent(nn.Module):
    """The same dense layers at every time step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 4)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


class TwoHeads(nn.Module):
    """The output is a sum over calls with inputs of different rank of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(x).tanh().mean(1) + self.dense(x.mean(1)).tanh())


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """Dense layers with an activation between them."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return nn.Sequential(*modules[:-1])


def encoder_layer() -> nn.Module:
    """A whole transformer block of torch."""
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


def embed(table: nn.Module, *after: nn.Module) -> nn.Sequential:
    """The mean of the tokens' rows, then a dense head."""
    return nn.Sequential(table, Mean(), *after, nn.Tanh(), nn.LazyLinear(CLASSES))


def freeze(model: nn.Module, *names: str) -> nn.Module:
    """The model with some parameters frozen."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def after_norm(norm: nn.Module, width: int) -> nn.Sequential:
    """The norm with weights that are not 1 and 0, between two other layers."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return nn.Sequential(nn.Linear(width, width), norm, nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))


def conv(module: nn.Module) -> nn.Sequential:
    """The convolution, then a dense head."""
    return nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))


def batch_norm() -> nn.Sequential:
    """BatchNorm in eval mode, with statistics of its own."""
    norm = nn.BatchNorm1d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return mlp_with(norm).eval()


def mlp_with(module: nn.Module) -> nn.Sequential:
    """Two dense layers with `module` between them."""
    return nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, CLASSES))


# ---- the grid --------------------------------------------------------------------------------------------------------


def normal(*shape: int) -> Callable[[int], Tensor]:
    """Draw (batch, *shape) in float64."""
    return lambda batch: torch.randn(batch, *shape, dtype=torch.float64)


def tokens(count: int | tuple[int, ...], vocabulary: int) -> Callable[[int], Tensor]:
    """Draw (batch, *count) indices, with repetitions."""
    shape = (count,) if isinstance(count, int) else count
    return lambda batch: torch.randint(vocabulary, (batch, *shape))


@dataclass(frozen=True)
class Case:
    """A model, what it is fed, and the loss."""

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], Any] = field(default_factory=lambda: normal(4))
    loss: Loss = CROSS_ENTROPY
    float_input: bool = True

    def __str__(self) -> str:
        return self.name

    def problem(self, batch: int = B, dtype: torch.dtype = torch.float64) -> Problem:
        """Model, input, target and criterion, the same ones on every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            x = self.draw(batch)
            model = self.build()
            _call(model, x, torch.float32)  # lazy layers find their widths
            model = model.to(dtype)
            with torch.no_grad():
                output = _call(model, x, dtype)
            y = self._target(output)
        criterion = self.loss.criterion
        if isinstance(criterion, nn.Module):
            criterion = criterion.to(dtype)
        return Problem(model, _cast(x, dtype), y, criterion)

    def _target(self, output: Tensor) -> Tensor:
        if self.loss.target == "like_output":
            return torch.rand_like(output)
        shape = output.shape[:1] + (output.shape[2:] if self.loss.target == "classes" else ())
        return torch.randint(output.shape[1], shape)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, dict):
        return {name: _cast(value, dtype) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(_cast(value, dtype) for value in x)
    return x.to(dtype) if x.is_floating_point() else x


def _call(model: nn.Module, x: Any, dtype: torch.dtype) -> Tensor:
    x = _cast(x, dtype)
    return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)


DENSE = [
    Case("one_layer", lambda: mlp(4, CLASSES)),
    Case("relu", lambda: mlp(4, 6, CLASSES)),
    Case("three_layers", lambda: mlp(4, 6, 5, CLASSES)),
    Case("four_layers", lambda: mlp(4, 6, 3, 5, CLASSES)),
    Case("width_is_batch_size", lambda: mlp(B, B, B, B), normal(B)),
    Case("tanh", lambda: mlp(4, 6, 5, CLASSES, activation=nn.Tanh)),
    Case("gelu", lambda: mlp(4, 6, CLASSES, activation=nn.GELU)),
    Case("silu", lambda: mlp(4, 6, CLASSES, activation=nn.SiLU)),
    Case("softplus", lambda: mlp(4, 6, CLASSES, activation=nn.Softplus)),
    Case("no_bias", lambda: mlp(4, 6, CLASSES, bias=False)),
    Case("frozen_weight", lambda: freeze(mlp(4, 6, CLASSES), "0.weight")),
    Case("frozen_bias", lambda: freeze(mlp(4, 6, CLASSES), "2.bias")),
    Case("inplace_relu", lambda: mlp(4, 6, CLASSES, activation=partial(nn.ReLU, inplace=True))),
    Case("prelu", lambda: mlp(4, 6, CLASSES, activation=nn.PReLU)),
    Case("prelu_per_channel", lambda: mlp_with(nn.PReLU(4))),
    Case("flattened_image", lambda: nn.Sequential(nn.Flatten(), *mlp(6, 5, CLASSES)), normal(1, 2, 3)),
    Case("functional", Functional),
]
CONV = [
    Case("conv1d", lambda: conv(nn.Conv1d(2, 3, 3, stride=2, padding=1)), normal(2, 7)),
    Case("conv1d_dilated", lambda: conv(nn.Conv1d(2, 3, 3, dilation=2, bias=False)), normal(2, 7)),
    Case("conv1d_groups", lambda: conv(nn.Conv1d(4, 6, 2, groups=2, stride=2)), normal(4, 7)),
    Case("conv1d_depthwise", lambda: conv(nn.Conv1d(4, 4, 2, groups=4)), normal(4, 6)),
    Case("conv1d_same", lambda: conv(nn.Conv1d(2, 3, 4, padding="same")), normal(2, 7)),
    Case("conv1d_circular", lambda: conv(nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular")), normal(2, 7)),
    Case("conv2d", lambda: conv(nn.Conv2d(2, 3, 3, padding=1)), normal(2, 4, 5)),
    Case("conv2d_uneven", lambda: conv(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2), (1, 2))), normal(2, 5, 6)),
    Case("conv2d_groups_same", lambda: conv(nn.Conv2d(4, 4, (2, 3), padding="same", groups=2)), normal(4, 4, 4)),
    Case("conv2d_pointwise", lambda: conv(nn.Conv2d(3, 2, 1)), normal(3, 3, 3)),
    Case("conv2d_reflect", lambda: conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), normal(2, 4, 4)),
    Case("conv2d_frozen_weight", lambda: freeze(conv(nn.Conv2d(2, 3, 3)), "0.weight"), normal(2, 4, 4)),
    Case("conv2d_batch_sized", lambda: conv(nn.Conv2d(B, B, 3, padding=1)), normal(B, B, B)),
    Case("conv2d_remainder", lambda: conv(nn.Conv2d(1, 2, 2, stride=3)), normal(1, 7, 6)),
    Case("conv2d_wide", lambda: conv(nn.Conv2d(4, 8, 3)), normal(4, 4, 4)),  # Gram matrices between pixels are smaller
    Case("conv1d_wide_groups", lambda: conv(nn.Conv1d(8, 12, 3, groups=2)), normal(8, 4)),
    Case("conv1d_valid", lambda: conv(nn.Conv1d(2, 3, 3, padding="valid")), normal(2, 5)),
    Case(
        "conv_stack",
        lambda: conv(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2))),
        normal(1, 5, 5),
    ),
    Case("conv_transpose", lambda: conv(nn.ConvTranspose1d(2, 3, 3)), normal(2, 4)),
    Case("conv3d", lambda: conv(nn.Conv3d(1, 2, 2)), normal(1, 3, 3, 3)),
]
TOKENS = [
    Case("tokens", lambda: nn.Sequential(*mlp(4, 6, 4), Mean(), nn.Linear(4, CLASSES)), normal(3, 4)),
    Case("tokens_as_batch", lambda: nn.Sequential(*mlp(4, 6, 4), Mean(), nn.Linear(4, CLASSES)), normal(B, 4)),
    Case(
        "many_tokens",
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), Mean(), nn.Linear(2, 3)),
        normal(9, 2),
    ),
    Case("wide_tokens", lambda: nn.Sequential(*mlp(8, 9, 8), Mean(), nn.Linear(8, CLASSES)), normal(2, 8)),
    Case(
        "tokens_2d",
        lambda: nn.Sequential(*mlp(3, 5, 4), Mean(), Mean(), nn.Linear(4, CLASSES)),
        normal(2, 3, 3),
    ),
    Case(
        "per_position",
        lambda: nn.Sequential(*mlp(4, 6, 3), Transpose()),
        normal(B, 4),
        POSITION_CROSS_ENTROPY,
    ),
    Case("embedding", lambda: embed(nn.Embedding(6, 4)), tokens(7, 6), float_input=False),
    Case("embedding_padding", lambda: embed(nn.Embedding(3, 4, padding_idx=1)), tokens(B, 3), float_input=False),
    Case("embedding_once", lambda: embed(nn.Embedding(2, 4)), tokens(1, 2), float_input=False),
    Case("embedding_2d", lambda: embed(nn.Embedding(4, 3), Mean()), tokens((2, 3), 4), float_input=False),
    Case("attention", lambda: WithMathAttention(Attention()), normal(B, 4)),
    Case(
        "encoder_layer",
        lambda: WithMathAttention(nn.Sequential(encoder_layer(), Mean(), nn.Linear(4, CLASSES))),
        normal(3, 4),
    ),
    Case(
        "encoder_layer_eval",
        lambda: WithMathAttention(nn.Sequential(encoder_layer(), Mean(), nn.Linear(4, CLASSES))).eval(),
        normal(B, 4),
    ),
    Case("tokens_first", TokensFirst, normal(B, 4)),
    Case("tokens_first_other_count", TokensFirst, normal(3, 4)),
    Case("positions", Positions, normal(B, 4)),
    Case("flattened_tokens", Flattened, normal(3, 4)),
    Case("class_token", ClassToken, normal(2, 4)),
    Case("recurrent", Recurrent, normal(3, 4)),
    Case("two_ranks_of_one_weight", TwoHeads, normal(3, 4)),
]
NORMS = [
    Case("layer_norm", lambda: after_norm(nn.LayerNorm(4), 4)),
    Case("layer_norm_no_bias", lambda: after_norm(nn.LayerNorm(4, bias=False), 4)),
    Case("layer_norm_tokens", lambda: after_norm(nn.LayerNorm(4), 4), normal(B, 4)),
    Case("layer_norm_2d", lambda: after_norm(nn.LayerNorm((3, 4), eps=1e-2), 4), normal(2, 3, 4)),
    Case("group_norm", lambda: after_norm(nn.GroupNorm(2, 6), 6), normal(6)),
    Case("group_norm_pixels", lambda: after_norm(nn.GroupNorm(3, 6, eps=1e-2), 4), normal(6, 4)),
    Case("group_norm_image", lambda: after_norm(nn.GroupNorm(1, 2), 3), normal(2, 3, 3)),
    Case("instance_norm", lambda: after_norm(nn.InstanceNorm1d(3, affine=True), 4), normal(3, 4)),
    Case("rms_norm", lambda: after_norm(nn.RMSNorm(4), 4)),
    Case("batch_norm_eval", batch_norm),
]
SHARED = [
    Case("custom_parameter", lambda: mlp_with(Scale(4))),
    Case("only_a_custom_parameter", lambda: nn.Sequential(Scale(4))),
    Case("parametrised", lambda: nn.Sequential(unit_rows(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, CLASSES))),
    Case("parametrised_conv", lambda: conv(unit_rows(nn.Conv1d(2, 3, 3))), normal(2, 6)),
    Case(
        "spectral_norm_eval",
        lambda: nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, CLASSES)).eval(),
    ),
    Case("reused", Reused),
    Case("reused_in_two_kinds", ReusedInTwoKinds),
    Case("tied_autoencoder", TiedAutoencoder, loss=MSE),
    Case("tied_by_matmul", TiedByMatmul),
    Case("tied_embedding", TiedEmbedding, tokens(B, 7), POSITION_CROSS_ENTROPY, float_input=False),
    Case(
        "tied_embedding_padding",
        partial(TiedEmbedding, padding_idx=-7),
        tokens(B, 7),
        POSITION_CROSS_ENTROPY,
        float_input=False,
    ),
    Case("tied_table_padding", TiedTable, tokens(B, 7), POSITION_CROSS_ENTROPY, float_input=False),
    Case("broadcast_bias", BroadcastBias),
    Case("vector_weight", VectorWeight, normal(2, 4)),
    Case("ensemble", Ensemble),
    Case("residual", Residual),
    Case("sliced_weight", Sliced),
    Case("reversed_batch", Reversed),
    Case("unused_parameter", Unused),
    Case("two_inputs_tuple", TwoInputs, lambda batch: (normal(4)(batch), normal(2)(batch), tokens(3, 6)(batch))),
    Case(
        "two_inputs_dict",
        TwoInputs,
        lambda batch: {"tokens": tokens(3, 6)(batch), "image": normal(4)(batch), "vector": normal(2)(batch)},
    ),
    Case("masked", Masked, lambda batch: (normal(4)(batch), torch.rand(batch, 6) < 0.5)),
]

ARCHITECTURES = [*DENSE, *CONV, *TOKENS, *NORMS, *SHARED]
FLOAT_INPUT = [case for case in ARCHITECTURES if case.float_input]
LOSS_CASES = [
    *[Case(loss.name, partial(mlp, 4, 6, CLASSES, activation=nn.Tanh), loss=loss) for loss in LOSSES],
    *[
        replace(case, name=loss.name, loss=loss)
        for case in TOKENS
        if case.name == "per_position"
        for loss in POSITION_LOSSES
    ],
]
SMOOTH = [case for case in ARCHITECTURES if case.name in {"tanh", "gelu", "softplus", "conv2d", "tokens", "layer_norm"}]


def find(name: str) -> Case:
    """The case of that name."""
    return next(case for case in [*ARCHITECTURES, *LOSS_CASES] if case.name == name)
