"""HTML pages from templates that lie beside the modules that fill them."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape


def open_templates(folder: Path) -> Environment:
    """The templates of a folder; whatever is put into a page is escaped."""
    return Environment(
        loader=FileSystemLoader(folder), autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True
    )
