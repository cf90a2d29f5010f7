"""The flags that every recipe has, and how a command line or a YAML file becomes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, Literal, TypeVar

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser

RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("epochs", "batch_size", "every_n_steps", "checks", "probe_size"), (1, inf)),
    **dict.fromkeys(("val_size", "lr", "momentum", "weight_decay", "sam_radius"), (0, inf)),
    **dict.fromkeys(("dropout", "label_smoothing"), (0, 1)),
    "seed": (0, 2**32 - 1),
}
PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")  # the bound needs weights of 32 bits or more
VARIANTS = {  # of the penalties → what they are variants of
    "method": ("input", "param", "both"),
    "of": ("input", "both"),
    "over": ("param", "both"),
    "unsquared": ("input", "param", "both"),
    "every_n_steps": ("input", "param", "both"),
}
UNSUITABLE = {  # strategies → why
    **dict.fromkeys(
        ("spawn", "fork", "notebook"), "the checks and logs of a run are lost with processes that end before it"
    ),
    **dict.fromkeys(("fsdp", "deepspeed", "model_parallel"), "the bound needs whole weights, and this one shards them"),
}
CTRL_C = 130  # the exit status that shells expect


class UserError(ValueError):
    """A mistake in the flags, or data that is not there: shown without a traceback."""


@dataclass(kw_only=True)
class Settings:
    """Flags that every recipe has.

    Attributes:
        dataset: what is trained on.
        penalty: which gradient penalties to add to the cross entropy.
        weight: of the penalty; with --penalty both, of the input penalty. Default: one that helps.
        param_weight: of the parameter penalty with --penalty both. Default: one that helps.
        method: how a penalty is computed; projection goes with --of output.
        of: what the input penalty is about: the loss, or the Jacobian of all outputs.
        over: the parameter penalty's gradients are those of single samples, of the batch, or of micro-batches (a number).
        unsquared: penalise norms, not their squares.
        every_n_steps: compute the penalties on every n-th step only, with as many times the weight.
        sam_radius: of sharpness-aware minimisation; 0 is without.
        label_smoothing: of the cross entropy that is minimised.
        hidden: widths of the hidden layers, separated by commas.
        activation: between the dense layers.
        init: how the weights begin: as torch draws them, or by a scheme with the activation's gain and biases of 0.
        dropout: probability after every activation.
        optimizer: AdamW, or plain SGD.
        momentum: of SGD.
        weight_decay: of the optimizer.
        schedule: of the learning rate: one cycle over the whole run, or none.
        epochs: passes over the training images.
        lr: learning rate; the peak of a one-cycle schedule.
        batch_size: per process.
        train_size: train on so many images, drawn by the seed. Default: all.
        val_size: hold out so many training images, to choose settings by.
        seed: of everything random.
        checks: how often the inequality is looked at, evenly spread; the first steps get a few more.
        probe_size: on how many training images.
        accelerator: as Lightning's Trainer takes it, like the next two.
        devices: how many, or which.
        strategy: auto, ddp, ...
        precision: 32-true, 64-true, 16-mixed or bf16-mixed.
        data_dir: where the data is, or is downloaded to.
        out: folder for the results. Default: runs/<dataset>-<penalty>-s<seed>.
        resume: go on from the last finished epoch that lies under --out, with the flags that it was trained with.
    """

    dataset: str = "auto"
    penalty: Literal["none", "input", "param", "both"] = "none"
    weight: float | None = None
    param_weight: float | None = None
    method: Literal["exact", "projection", "finite_difference"] = "exact"
    of: Literal["loss", "output"] = "loss"
    over: int | Literal["sample", "batch"] = "sample"
    unsquared: bool = False
    every_n_steps: int = 1
    sam_radius: float = 0.0
    label_smoothing: float = 0.0
    hidden: str = "512,512"
    activation: Literal["relu", "gelu", "silu", "softplus", "tanh"] = "relu"
    init: Literal["default", "he", "xavier", "orthogonal"] = "default"
    dropout: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 128
    train_size: int | None = None
    val_size: int = 0
    seed: int = 0
    checks: int = 30
    probe_size: int = 64
    accelerator: str = "auto"
    devices: int | str = 1
    strategy: str = "auto"
    precision: str = "32-true"
    data_dir: str = "data"
    out: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse what would fail later with a worse message, or would be ignored."""
        for name, (least, most) in RANGES.items():
            if not least <= getattr(self, name) <= most:  # NaN is not
                expected = f">= {least}" if most == inf else f"from {least} to {most}"
                raise UserError(f"{flag(name)} must be {expected}, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision must be one of {', '.join(PRECISIONS)}, got {self.precision}")
        for word, why in UNSUITABLE.items():
            if word in self.strategy:
                raise UserError(f"--strategy {self.strategy}: {why}. Use ddp, or a single device")
        if self.momentum and self.optimizer != "sgd":
            raise UserError(f"--momentum {self.momentum} is SGD's, got --optimizer {self.optimizer}")
        if self.param_weight is not None and self.penalty != "both":
            raise UserError(
                f"--param-weight is the second weight of --penalty both, got --penalty {self.penalty}: use --weight"
            )
        if self.weight and self.penalty == "none":
            raise UserError(f"--weight {self.weight} needs a penalty to weigh, got --penalty none")
        for name, penalties in VARIANTS.items():
            if self.penalty not in penalties and getattr(self, name) != getattr(type(self), name):
                raise UserError(
                    f"{flag(name)} is for --penalty {' or '.join(penalties)}, got --penalty {self.penalty}: "
                    f"give one of these, or leave {flag(name)} out"
                )
        self.widths()

    def widths(self) -> list[int]:
        """The widths of the hidden layers."""
        parts = [part.strip() for part in self.hidden.split(",") if part.strip()]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise UserError(f"--hidden must be widths >= 1 separated by commas, such as 512,512, got {self.hidden!r}")
        return [int(part) for part in parts]


def flag(name: str) -> str:
    """What the command line calls a setting."""
    return f"--{name.replace('_', '-')}"


Some = TypeVar("Some", bound=Settings)
Flags = TypeVar("Flags")


def with_default_weights(settings: Some, defaults: Mapping[str, tuple[float, float | None]]) -> Some:
    """The same settings, with weights where none were given.

    Args:
        settings: weights may be None.
        defaults: penalty → (weight, param_weight).

    Raises:
        UserError: for a variant of the penalties that the defaults were not measured for.
    """
    if settings.penalty == "none":
        return replace(settings, weight=0.0)
    weight, param_weight = settings.weight, settings.param_weight
    needed = [weight, param_weight] if settings.penalty == "both" else [weight]
    asked = ((flag, getattr(settings, flag), usual) for flag, usual in (("of", "loss"), ("over", "sample")))
    variant = [f"--{flag} {value}" for flag, value, usual in asked if value != usual]
    if None in needed and variant:
        raise UserError(
            f"{' '.join(variant)} has no default weight: give --weight"
            f"{' and --param-weight' if settings.penalty == 'both' else ''}"
        )
    first, second = defaults[settings.penalty]
    return replace(
        settings,
        weight=first if weight is None else weight,
        param_weight=second if param_weight is None else param_weight,
    )


class DashedParser(ArgumentParser):
    """Takes ``--train-size`` for what YAML files call ``train_size``, ``--train_size`` too, and ``--resume`` alone."""

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Add one flag under both spellings."""
        dashed = [name.replace("_", "-") for name in names]
        if options.get("type") is bool:
            options |= {"action": ActionYesNo(no_prefix=None)}
            del options["type"]
        return super().add_argument(*dict.fromkeys([*dashed, *names]), **options)


def run_recipe(recipe: Callable[[Flags], object], settings: type[Flags]) -> None:
    """Run a recipe from the command line; mistakes, places that cannot be read or written, and Ctrl-C take one line each."""
    try:
        recipe(parse_flags(settings))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, SystemExit) as stop:
        of_lightning = isinstance(stop.__context__, KeyboardInterrupt) and stop.args == (1,)  # its answer to Ctrl-C
        if isinstance(stop, SystemExit) and not of_lightning:
            raise
        how = "With --resume, the same command goes on after the last epoch that was finished, if there is one."
        print(f"Stopped. {how}", file=sys.stderr)
        sys.exit(CTRL_C)


def parse_flags(settings: type[Flags], args: Sequence[str] | None = None) -> Flags:
    """The settings from flags, and from YAML by ``--config file.yaml``; ``--print_config`` prints such a file.

    Args:
        settings: a dataclass; its docstring is the help.
        args: the command line without the program's name; default ``sys.argv``.
    """
    parser = DashedParser(description=(settings.__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the flags below")
    parser.add_class_arguments(settings, as_group=False)
    given = parser.parse_args(None if args is None else list(args))
    return settings(**{field.name: given[field.name] for field in fields(settings)})
