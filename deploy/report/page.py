"""Puts the data of a run and the files of page/ into one HTML text. Runs anywhere.

Text from a model, a prompt or a service is in the page as data only: JSON in which "<", ">", "&" and control characters
are escaped. The scripts show it as text. The page's Content-Security-Policy lets the browser run only the scripts that
are put here, by their hashes, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from bokeh.resources import Resources

from deploy.screen.console import printable

SCRIPTS = (
    *("data.js", "charts.js", "curves.js", "rollouts.js", "quantities.js", "tokens.js", "scores.js", "critic.js"),
    *("variance.js", "evaluation.js", "forgetting.js", "tuning.js", "main.js"),
)
_PAGE = files("deploy.report") / "page"


def render(title: str, blocks: Mapping[str, Any]) -> str:
    """The page. `blocks`: the values that the scripts find under these names."""
    scripts = [_charting_library(), "\n".join(_read(name) for name in SCRIPTS)]
    parts = {
        "policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        f"form-action 'none'; script-src {' '.join(map(_hash, scripts))}",
        "title": html.escape(printable(title)),
        "style": _read("page.css"),
        "data": "\n".join(
            f'<script type="application/json" id="{name}-data">{json_text(value)}</script>'
            for name, value in blocks.items()
        ),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    page = _read("page.html")
    before, *rest = page.split("<!--put ")
    return before + "".join(parts[name] + after for name, _, after in (part.partition("-->") for part in rest))


def beginning() -> str:
    """The beginning of every page, up to the tag that names its command."""
    before, tag, _ = _read("page.html").partition('<meta name="generator" content="ratchet report">')
    return before + tag


def json_text(value: Any) -> str:
    """JSON that is inert inside a <script> element."""
    text = json.dumps(_printable(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _printable(value: Any) -> Any:
    """The value with every text made printable, and every number that JSON lacks as null."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {_printable(str(key)): _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return value


@cache
def _charting_library() -> str:
    """Bokeh's JavaScript, which its Python package has."""
    return "\n".join(Resources(mode="inline", components=["bokeh", "bokeh-api"], log_level="error").js_raw)


@cache
def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
