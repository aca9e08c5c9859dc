"""Sphinx settings: MyST pages, reference from the docstrings."""

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
