"""How the documentation is built: ``make docs``."""

from __future__ import annotations

import inspect

from sphinx.application import Sphinx

from gradpen import __version__

project = "gradpen"
author = "The gradpen authors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_generated"]  # the second holds what pages include
default_role = "autolink"  # `name` in a docstring: a link if there is something of that name
nitpicky = True
nitpick_ignore_regex = [
    # Types of other libraries, whose inventories are not fetched, and abbreviations used in signatures.
    ("py:.*", r"(torch|lightning|lightning_fabric|pytorch_lightning|torchmetrics|matplotlib|collections|typing)\b.*"),
    ("py:.*", r"(Tensor|Any|Callable|Module|Parameter|Generator|Metric|Figure|PathLike|os\.PathLike|optional)"),
    ("py:.*", r"(nn|F|Axes|Trainer|LightningModule|STEP_OUTPUT)\b.*"),
    # Types that only gradpen's own code spells out.
    ("py:.*", r"(gradpen\.[\w.]+\.)?(Weight|ParameterFilter|Getter|Row|Term|Criterion|GroupNorms|GradPenalty)"),
]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the Args sections say it with shapes
napoleon_custom_sections = ["Source"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"gradpen {version}"
html_theme_options = {"navigation_with_keys": True}


def restore_property(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes "words: more words" of a property for "type: description"."""
    if what == "property":
        lines[:] = [*(inspect.getdoc(obj) or "").splitlines(), ""]


def setup(app: Sphinx) -> None:
    """Run after napoleon, which has priority 500."""
    app.connect("autodoc-process-docstring", restore_property, priority=600)
