"""The page: one HTML file with its data, script and style inside. It asks nothing of a network, and its policy forbids it to."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from fxopt.errors import DataError


def html(data: Mapping[str, Any]) -> str:
    """The page of what `view.data.data` gives.

    The content security policy allows the one script and the one style by their digests and nothing else. The data are no script: JSON in
    which "<" is escaped, so that no text of a model can end the element.
    """
    folder = resources.files("fxopt.view")
    page, style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js"))
    policy = f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    said = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    for name, text in (("POLICY", policy), ("STYLE", style), ("DATA", said), ("SCRIPT", script)):
        page = page.replace(f"<!--{name}-->", text, 1)
    return page


def write(data: Mapping[str, Any], file: str | Path) -> int:
    """Write the page; returns its size in bytes.

    Raises:
        DataError: the file cannot be written.
    """
    text = html(data).encode()
    try:
        Path(file).write_bytes(text)
    except OSError as error:
        raise DataError(f"the page cannot be written: {error.strerror}", where=str(file), do="name a file in a folder that exists") from error
    return len(text)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
