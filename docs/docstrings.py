"""Translates the docstrings' ways of saying things into what mkdocstrings understands."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """A section ``Example:`` becomes ``Examples:``, and a role like ``:class:`` is left out.

    Otherwise doctests would be set as paragraphs, and lists in them taken for links.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Translate a docstring that was just read."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r":(?:meth|class|func|mod):`~?", "`", text)
