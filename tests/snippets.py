"""The code blocks of the documentation that are tested word for word."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def snippet(page: str, name: str) -> str:
    """A block between ``<!-- name -->`` and ``<!-- /name -->`` of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- /{name} -->", text, re.DOTALL)
    assert found, f"{page} has no snippet {name}"
    return found.group(1)


def run(page: str, name: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run a block in a namespace, which it may add to."""
    exec(compile(snippet(page, name), f"{page}:{name}", "exec"), namespace)
    return namespace
