"""The page as one document: its style and its script inside it, and a policy that lets nothing else run or load."""

import base64
import functools
import hashlib
from dataclasses import dataclass
from importlib.resources import files

STYLES = ("look.css", "engine.css")
SCRIPTS = ("page.js", "answer.js", "talk.js", "load.js", "charts.js", "watch.js")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What is sent: HTML in UTF-8, and the headers that belong to it."""

    body: bytes
    headers: dict[str, str]


@functools.cache
def document() -> Document:
    """The page, read once. Scripts are one scope, in the order of `SCRIPTS`."""
    here = files("gcompute.serve.page")
    read = lambda name: here.joinpath(name).read_text(encoding="utf-8")  # noqa: E731
    style = "\n" + "\n".join(map(read, STYLES))
    script = '\n(() => {\n"use strict";\n' + "\n".join(map(read, SCRIPTS)) + "})();\n"
    page = read("index.html").replace("/* style */", style).replace("/* script */", script)
    policy = (
        "default-src 'none'",
        f"style-src {source_of(style)}",
        f"script-src {source_of(script)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "Content-Type": "text/html; charset=utf-8",
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    return Document(body=page.encode(), headers=headers)


def source_of(text: str) -> str:
    """How a policy names the one inline style or script that it allows.

    >>> source_of("")
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
