"""What mkdocs does with a page beside Markdown: formulas become MathML, and pictures part of the page.

Browsers draw MathML themselves, so no script is needed for formulas. A picture that is part of the page takes its
text's colour from it, so that it suits light and dark.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.utils import get_relative_url

IMAGES = Path(__file__).parent.parent / "img"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
PICTURE = re.compile(
    r'<p><img alt="([^"]*)" src="[^"]*img/([\w-]+)\.svg"\s*/?>(?:\s*<em>(.*?)</em>)?</p>', re.DOTALL
)
INK, PAPER = "#1b1f24", "#fefefe"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leave out the comments that say where a number comes from."""
    return re.sub(r"<!-- ?[=~].*?-->", "", markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Replace formulas and pictures in the finished page, so that the search index has neither."""
    return PICTURE.sub(_figure, FORMULA.sub(_mathml, _local(output, page.url)))


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    """Pages that are not of this folder, such as 404.html."""
    return _local(output_content, template_name) if template_name.endswith(".html") else output_content


def _local(output: str, url: str) -> str:
    """The theme's one address on the network, replaced by a script of our own that does the same."""
    return output.replace("https://unpkg.com/iframe-worker/shim", get_relative_url("theme/worker.js", url))


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    formula = latex2mathml.converter.convert(html.unescape(match[3]), display=display)
    return f'<{match[1]} class="arithmatex">{formula}</{match[1]}>'


def _figure(match: re.Match[str]) -> str:
    alt, name, caption = match.groups()
    drawing = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    drawing = re.sub(
        r' id="(?=figure|axes|patch|line2d|text|legend|matplotlib|xtick|ytick)', f' id="{name}-', drawing
    )
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure id="{name}">{drawing.replace("<svg", f"""<svg role="img" aria-label="{alt}" """, 1)}{caption}</figure>'
