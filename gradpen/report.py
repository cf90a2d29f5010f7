"""Both sides of the inequality, term by term: the result of `gradpen.evaluate_inequality`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor


class ExcludedLayer(NamedTuple):
    """A layer (or single parameter) that is not in the sum, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class LayerTerms:
    r"""What one dense layer z = W h + b adds to both sides. Tensors are (B,) unless said otherwise.

    With ``norm="joint"``, :math:`\|W J\|^2` stands in the place of :math:`\|W\|^2\|J\|^2` in the formulas, and ‖W‖ and ‖J‖
    are spectral norms.

    Attributes:
        name: the layer's name in the model.
        weight_lhs: :math:`\|\nabla_x f\|^2 \|h\|^2 / (\|W\|^2\|J\|^2)`; None if W is frozen.
        weight_rhs: :math:`\|\nabla_W f\|^2 = \|\delta\|^2\|h\|^2`; None if W is frozen.
        bias_lhs: :math:`\|\nabla_x f\|^2 / (\|W\|^2\|J\|^2)`; None if b is frozen or absent.
        bias_rhs: :math:`\|\nabla_b f\|^2 = \|\delta\|^2`; None if b is frozen or absent.
        coefficient: :math:`(1+\|h\|^2)/(\|W\|^2\|J\|^2)` with the terms that count; 0 for a dead layer, and where the left
            side would be too large since ‖J‖ is rounding (behind a saturated softmax, for instance).
        input_sq_norm: :math:`\|h\|^2`.
        weight_norm: ‖W‖ in the norm of the report, 0-dim; None where it was not computed (``norm="joint"`` without slack).
        jacobian_norm: ‖J‖ in the norm of the report; None where it was not computed.
        jacobian_norm_upper: an upper end of ‖J‖ that holds with the stated probability.
        product_norm: ‖W J‖₂; None where it was not computed.
        slack_product: ‖W‖‖J‖ / ‖W J‖ >= 1, what is lost by taking the norms apart; NaN for a dead layer, None where it was
            not computed, as with ``norm="frobenius"``.
        slack_alignment: ‖W J‖‖δ‖ / ‖∇_x f‖ >= 1, what is lost since δ is no top singular vector; NaN where ∇_x f = 0, None
            where it was not computed.
    """

    name: str
    weight_lhs: Tensor | None
    weight_rhs: Tensor | None
    bias_lhs: Tensor | None
    bias_rhs: Tensor | None
    coefficient: Tensor
    input_sq_norm: Tensor
    weight_norm: Tensor | None
    jacobian_norm: Tensor | None
    jacobian_norm_upper: Tensor | None
    product_norm: Tensor | None
    slack_product: Tensor | None
    slack_alignment: Tensor | None

    @property
    def lhs(self) -> Tensor:
        """The layer's share of the left side: (B,)."""
        return _sum_present(self.weight_lhs, self.bias_lhs)

    @property
    def rhs(self) -> Tensor:
        """The layer's share of the right side: (B,)."""
        return _sum_present(self.weight_rhs, self.bias_rhs)

    @property
    def tightness(self) -> Tensor:
        """lhs/rhs of this layer alone, which is the same for its weight and its bias: (B,), NaN where undefined."""
        return ratio_or_nan(self.lhs, self.rhs)


@dataclass(frozen=True, eq=False)
class InequalityReport:
    r"""Both sides of the inequality for every sample of one batch.

    .. math:: \|\nabla_x f\|^2 \sum_t \frac{1 + \|h_t\|^2}{\|W_t\|^2 \|J_t\|^2} \le \|\nabla_\theta f\|^2

    With ``norm="joint"`` the denominator is :math:`\|W_t J_t\|^2`.

    Attributes:
        lhs: left side, (B,): from the most accurate norms.
        rhs: right side, (B,): over all trainable parameters, also those outside the sum.
        lhs_lower: a left side that is certainly not too large (with probability 1 − delta over the whole report).
        lhs_upper: a left side that is certainly not too small.
        holds: (B,) bool, False only if ``lhs_lower`` exceeds ``rhs`` by more than rounding.
        input_grad_sq_norm: :math:`\|\nabla_x f_i\|^2`, (B,).
        param_grad_sq_norm: :math:`\|\nabla_\theta f_i\|^2`, (B,); the same as ``rhs``.
        batch_grad_sq_norm: :math:`\|\nabla_\theta \frac1B\sum_i f_i\|^2`, 0-dim.
        layers: the layers in the sum, in forward order.
        excluded: the layers and parameters that are not, with the reason.
        of: what f is.
        norm: "spectral", "frobenius" or "joint".
        delta: the probability with which some upper end of a norm may fail.
    """

    lhs: Tensor
    rhs: Tensor
    lhs_lower: Tensor
    lhs_upper: Tensor
    holds: Tensor
    input_grad_sq_norm: Tensor
    param_grad_sq_norm: Tensor
    batch_grad_sq_norm: Tensor
    layers: list[LayerTerms]
    excluded: list[ExcludedLayer]
    of: str
    norm: str
    delta: float

    @property
    def tightness(self) -> Tensor:
        """lhs/rhs in [0, 1] up to rounding: (B,), NaN where both sides are 0."""
        return ratio_or_nan(self.lhs, self.rhs)

    @property
    def violations(self) -> int:
        """For how many samples the inequality does not hold: none, unless there is a bug or an unknown structure."""
        return int((~self.holds).sum())

    @property
    def undefined(self) -> int:
        """For how many samples both sides are 0 (or overflowed), so that there is no tightness."""
        return int(self.tightness.isnan().sum())

    @property
    def noise_trace(self) -> Tensor:
        """Trace of the gradient-noise covariance, mean_i ‖∇_θ f_i‖² − ‖∇_θ mean_i f_i‖²: 0-dim."""
        return self.param_grad_sq_norm.mean() - self.batch_grad_sq_norm

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings and lists, ready for ``json.dumps``; NaN becomes None."""
        plain = {field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.name != "layers"}
        derived = ("tightness", "violations", "undefined", "noise_trace")
        plain |= {name: _plain(getattr(self, name)) for name in derived}
        plain["excluded"] = [layer._asdict() for layer in self.excluded]
        plain["layers"] = [
            {field.name: _plain(getattr(layer, field.name)) for field in fields(layer)}
            | {name: _plain(getattr(layer, name)) for name in ("lhs", "rhs", "tightness")}
            for layer in self.layers
        ]
        return plain

    def __str__(self) -> str:
        """A table: both sides, then one line for every layer (means over the samples)."""
        title = f"inequality of {self.lhs.numel()} samples, f = {self.of}, {self.norm} norms"
        denominator = "‖W_t J_t‖²" if self.norm == "joint" else "(‖W_t‖²‖J_t‖²)"
        sides: list[tuple[str, ...]] = [
            (f"‖∇_x f‖² · Σ_t (1+‖h_t‖²)/{denominator}", f"{_mean(self.lhs)}  (mean over samples)"),
            ("‖∇_θ f‖²", _mean(self.rhs)),
            ("tightness", _spread(self.tightness)),
        ]
        lines = [
            title,
            "-" * len(title),
            *_table(sides),
            f"violations {self.violations}, undefined {self.undefined}, noise trace {_mean(self.noise_trace)}",
            "",
        ]
        header = ("layer", "‖h‖²", "‖W‖", "‖J‖", "coefficient", "tightness", "‖W‖‖J‖/‖WJ‖", "‖WJ‖‖δ‖/‖∇_x f‖")
        rows = [
            (
                layer.name,
                *map(
                    _mean,
                    (
                        layer.input_sq_norm,
                        layer.weight_norm,
                        layer.jacobian_norm,
                        layer.coefficient,
                        layer.tightness,
                        layer.slack_product,
                        layer.slack_alignment,
                    ),
                ),
            )
            for layer in self.layers
        ]
        lines += _table([header, *rows])
        if not self.layers:
            lines.append("no layer is in the sum: the left side is 0")
        lines += [f"left out: {layer.name}: {layer.reason}" for layer in self.excluded]
        return "\n".join(lines)


def ratio_or_nan(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator/denominator, NaN where the denominator is 0 or overflowed."""
    defined = (denominator > 0) & denominator.isfinite()
    return (numerator / denominator.where(defined, denominator.new_ones(()))).where(
        defined, denominator.new_full((), math.nan)
    )


def mean_defined(values: Tensor) -> float:
    """Mean over the entries that are not NaN; NaN if there is none."""
    return float(values.nanmean())


def _sum_present(*terms: Tensor | None) -> Tensor:
    present = [term for term in terms if term is not None]
    return present[0] if len(present) == 1 else present[0] + present[1]


def _mean(values: Tensor | None) -> str:
    return "–" if values is None else f"{mean_defined(values):.4g}"


def _spread(values: Tensor) -> str:
    defined = values[~values.isnan()]
    if defined.numel() == 0:
        return "undefined for every sample"
    return f"{defined.mean():.4g}  (min {defined.min():.4g}, max {defined.max():.4g})"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain(value: Any) -> Any:
    """Tensors as (nested lists of) numbers, NaN and infinities as None."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
