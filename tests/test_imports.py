"""A file imports only from lower floors, siblings never each other, and the package drags no framework along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradpen

PACKAGE = Path(gradpen.__file__).parent

FLOORS = [  # from the ground up; a folder is one entry
    {"_attributes", "_checks", "_layout", "_numerics", "_products", "_graph", "recurrence", "report"},
    {"criteria", "recording", "spectral", "history", "known_gradients"},
    {"closed_form", "cotangents", "dense_chain", "finite_difference", "isolation", "plotting"},
    {"chain_norms", "gradients", "jacobians", "module_chain", "terms"},
    {"chain_mean", "mixing"},
    {"chain_terms", "param_norms"},
    {"evaluation", "sides", "traced_chain"},
    {"cut_layers", "traced"},
    {"functional", "penalties"},
    {"layer_norms"},
    {"inequality"},
    {"metrics", "callbacks"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FRAMEWORKS = ["lightning", "pytorch_lightning", "torchmetrics", "torchvision", "matplotlib", "tensorboard"]


def part_of(path: Path) -> str:
    """The module of gradpen, or the folder, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Modules of gradpen that a file imports, anywhere in its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not getattr(node, "level", 0), f"{path} has a relative import"
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("gradpen.")}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    part = part_of(path)
    assert part in FLOOR, f"{part} has no floor: put it into FLOORS"
    for imported in imports_of(path) - {part}:
        assert FLOOR[imported] < FLOOR[part], f"{part} imports {imported}, which is not below it"


def test_every_floor_is_inhabited():
    assert set(FLOOR) - {"metrics"} <= {part_of(path) for path in FILES}


def test_importing_gradpen_imports_no_framework():
    program = f"import gradpen, gradpen.functional, sys; print([m for m in {FRAMEWORKS!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_public_names_exist():
    assert set(gradpen.__all__) >= {
        "InputGradPenalty",
        "ParamGradPenalty",
        "PenalizedLoss",
        "evaluate_inequality",
    }
    assert all(hasattr(gradpen, name) for name in gradpen.__all__)
