"""Sphinx settings: MyST pages, reference from the docstrings, tables of options from the dataclass fields."""

import dataclasses
import typing

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from srpo_core import options
from srpo_core.checked import names_of
from srpo_core.surrogates import Surrogate

project = "srpo_core"
author = "The srpo_core developers"
copyright = "2026, the srpo_core developers"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the shapes stand in the signature
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "srpo_core"
html_static_path: list[str] = []
nitpicky = False
suppress_warnings = ["myst.xref_missing"]


class Options(SphinxDirective):
    """``{options} Name``: a table of the options of a group, or of all ``surrogates``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        classes = Surrogate.known() if name == "surrogates" else {"": getattr(options, name)}
        lines: list[str] = []
        for title, cls in classes.items():
            hints = typing.get_type_hints(cls)
            lines += ["", f"`{title}` is `{cls.__name__}`:"] if title else []
            lines += ["", "| option | default | |", "|---|---|---|"]
            lines += [
                f"| {' | '.join(_row(each, hints[each.name]))} |" for each in dataclasses.fields(cls) if each.init
            ]
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source=f"options of {name}"), self.content_offset, container)
        return container.children


def _row(each: dataclasses.Field, hint: object) -> tuple[str, str, str]:
    names = ", ".join(f"`{value}`" for value in names_of(hint))
    function = ", or a function" if "Callable" in str(hint) else ""
    sentences = [each.metadata["help"], f"One of {names}{function}." if names else ""]
    if bounds := str(each.metadata["range"]):
        sentences.append(f"{bounds[0].upper()}{bounds[1:]}.")
    if (read_by := each.metadata["read_by"]) is not None:
        sentences.append(f"Read by `{read_by.option}` {', '.join(f'`{value}`' for value in read_by.values)}.")
    default = each.default if isinstance(each.default, tuple) else (each.default,)
    words = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in default)
    shown = " ".join(f"`{word}`" if word else '`""`' for word in words)
    return f"`{each.name}`", shown, " ".join(filter(None, sentences))


def setup(app) -> None:
    app.add_directive("options", Options)
