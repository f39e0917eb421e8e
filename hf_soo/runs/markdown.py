"""Texts of users, such as regular expressions, inside of reports: in Markdown, and in matplotlib's labels."""

from __future__ import annotations

import re

_MARKS = re.compile(r"[\\`*|]|\](?=[(\[:])|(?<!\w)_|_(?!\w)")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def plain(text: object) -> str:
    """A text on one line that Markdown shows letter by letter, in the cell of a table too."""
    return _MARKS.sub(r"\\\g<0>", " ".join(str(text).split()).translate(_HTML))


def label(text: str) -> str:
    """A text on one line that matplotlib shows letter by letter: between two dollars it would set mathematics."""
    return " ".join(text.split()).replace("$", r"\$")
