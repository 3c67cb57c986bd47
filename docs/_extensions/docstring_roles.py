"""Docstrings are written for readers of the code; this makes Markdown of what the site could not show as it stands."""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

_ROOT = Path(__file__).parents[2]
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([\w.]+)`")
_SECTION = re.compile(r"^(Shape|Source):[ \n]*\n?((?:[ ]{4}.*\n?|\S.*\n?)+)", re.MULTILINE)
_SHARED = re.compile(r"^([ ]{4})(\w+(?:, \w+)+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def to_markdown(text: str) -> str:
    """Roles become code, linked where documented here; our own sections become paragraphs; ``a, b: …`` two items."""
    text = _SHARED.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), text)
    text = _SECTION.sub(lambda m: f"**{m[1]}:** {re.sub(r'(?m)^ {4}', '', m[2])}", text)
    return _ROLE.sub(_link, text)


def _link(role: re.Match[str]) -> str:
    short, target = role.groups()
    shown = target.rpartition(".")[2] if short else target
    if target.startswith("torch."):
        return f"`{shown}`"
    identifier = target if target.startswith("orthogonium.") else f"orthogonium.{target}"
    if _ROOT.joinpath(*identifier.split(".")).with_suffix(".py").is_file():  # a function in a file of its name
        identifier += "." + identifier.rpartition(".")[2]
    return f'<autoref optional identifier="{identifier}"><code>{shown}</code></autoref>'


class DocstringRoles(Extension):
    """Rewrites every docstring once, when it has been read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
