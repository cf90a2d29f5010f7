"""The network of the recipes, and the ways in which it can begin."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

from torch import nn

from flags import Settings, UserError

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "softplus": nn.Softplus, "tanh": nn.Tanh}
GAINS = {"relu": "relu", "tanh": "tanh"}  # torch's names; it knows no gain of the others


def mlp(settings: Settings, num_features: int, num_classes: int) -> nn.Sequential:
    """Dense layers dense1, dense2, … with activations (and dropout) between them."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    widths = [num_features, *settings.widths()]
    for index, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        layers[f"dense{index}"] = nn.Linear(fan_in, fan_out)
        layers[f"activation{index}"] = ACTIVATIONS[settings.activation]()
        if settings.dropout:
            layers[f"dropout{index}"] = nn.Dropout(settings.dropout)
    layers[f"dense{len(widths)}"] = nn.Linear(widths[-1], num_classes)
    model = nn.Sequential(layers)
    initialise(model, settings.init, settings.activation)
    return model


def initialise(model: nn.Module, scheme: str, activation: str) -> None:
    """Draw the weights anew, with the activation's gain and biases of 0; "default" leaves them as torch drew them.

    Raises:
        UserError: for an activation that torch knows no gain of.
    """
    if scheme == "default":
        return
    if activation not in GAINS:
        raise UserError(f"--init {scheme} scales by the activation's gain, which torch knows for {', '.join(GAINS)}: "
                        f"got --activation {activation}")  # fmt: skip
    gain = nn.init.calculate_gain(GAINS[activation])  # type: ignore[arg-type]
    draw: dict[str, Callable[[nn.Linear], object]] = {
        "he": lambda layer: nn.init.kaiming_normal_(layer.weight, nonlinearity=GAINS[activation]),  # type: ignore[arg-type]
        "xavier": lambda layer: nn.init.xavier_uniform_(layer.weight, gain),
        "orthogonal": lambda layer: nn.init.orthogonal_(layer.weight, gain),
    }
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            draw[scheme](layer)
            nn.init.zeros_(layer.bias)
