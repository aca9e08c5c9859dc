"""The built documentation: formulas without a network, and nothing that a page loads from elsewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PAGE = r"""# A page

Inline $\tilde I$, and in a block:

$$
\begin{aligned}
v_t &= \exp\bigl(\alpha \tanh(s_t)\bigr) && t \text{ perception} \\
w_t &= v_t / \operatorname{mean}_S v
\end{aligned}
$$

```{options} CreditOptions
```

```{api} srpo_core.contrasts
visual_dependency
```

::::{grid} 2
:::{grid-item-card} A card
Text.
:::
::::
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One page with everything that the pages have, by the settings of the documentation."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("html")
    (source / "index.md").write_text(PAGE)
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "-b", "html", "-c", ROOT / "docs"]
    command += ["-D", "nitpicky=0"]  # what the names of this page refer to is on other pages
    result = subprocess.run([*command, source, out], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


class Loaded(HTMLParser):
    """What a page loads by itself: scripts, styles, fonts, images, frames; not what its links lead to."""

    def __init__(self, text):
        super().__init__()
        self.urls = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "link" and values.get("rel") not in ("next", "prev", "index", "search", "author", "canonical"):
            self.urls.append(values.get("href"))
        if tag in ("script", "img", "iframe", "source", "video", "object", "embed"):
            self.urls += [values[name] for name in ("src", "srcset", "data") if values.get(name)]


def test_a_page_loads_nothing_from_another_host(built):
    urls = Loaded((built / "index.html").read_text()).urls
    assert any(url.endswith(".js") for url in urls if url), "the probe works: there are scripts"
    assert [url for url in urls if url and re.match(r"(\w+:)?//", url)] == []
    for sheet in built.rglob("*.css"):
        loaded = re.findall(r"""url\(\s*["']?\s*([^"')]+)|@import\s+["']([^"']+)""", sheet.read_text())
        assert [url for pair in loaded for url in pair if re.match(r"(https?:)?//", url)] == [], sheet.name


def test_formulas_are_drawn_by_the_browser_itself(built):
    page = (built / "index.html").read_text()
    assert not [url for url in Loaded(page).urls if url and re.search("mathjax|katex.min", url, re.IGNORECASE)]
    assert "</mtable>" in page
    table = re.search(r"<mtable.*?</mtable>", page, re.DOTALL).group(0)
    assert table.count("<mtr>") == 2, "the two lines of the aligned equation"
    assert re.search("<mi[^>]*>mean</mi>", page), "the name of an operator in one piece"
    assert "<mover" in page, "a tilde over its letter"


def test_options_and_names_are_generated(built):
    page = (built / "index.html").read_text()
    assert "How far weights may move from 1" in page
    assert 'id="srpo_core.visual_dependency"' in page, "under the path that users import it by"
    assert "batch time" in page, "with its shapes"


def test_no_source_of_the_documentation_loads_from_another_host():
    for path in (ROOT / "docs").rglob("*.md"):
        if "_build" not in path.parts:
            text = path.read_text()
            assert not re.search(r"<(script|iframe|link)\b", text), path
            assert not re.search(r"!\[[^\]]*\]\(https?:", text), path
