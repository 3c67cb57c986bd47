"""Docstrings are written with the roles of Sphinx; the site is Markdown. This turns one into the other."""

import re
from typing import Any

from griffe import Docstring, Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(?:[^`<]*<)?(~?)([\w.]+)>?`")


def to_markdown(text: str) -> str:
    """``:class:`~a.b.C``` becomes the code ``C``, linked where this site documents it."""
    return _ROLE.sub(_link, text)


def _link(role: re.Match[str]) -> str:
    short, target = role.groups()
    shown = target.rpartition(".")[2] if short else target
    if target.startswith("torch."):
        return f"`{shown}`"
    identifier = target if target.startswith("orthogonium.") else f"orthogonium.{target}"
    return f'<autoref optional identifier="{identifier}"><code>{shown}</code></autoref>'


class DocstringRoles(Extension):
    """Rewrites every docstring once, when it has been read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        docstring: Docstring | None = obj.docstring
        if docstring is not None:
            docstring.value = to_markdown(docstring.value)
