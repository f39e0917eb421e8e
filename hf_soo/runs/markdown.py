"""Texts of users, such as regular expressions, inside of reports: in Markdown, matplotlib's labels and HTML."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element

_MARKS = re.compile(r"[\\`*|]|\](?=[(\[:])|(?<!\w)_|_(?!\w)")
# Half a surrogate pair, which JSON can hold and no file, becomes a mark.
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"}) | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def plain(text: object) -> str:
    """A text on one line that Markdown shows letter by letter, in the cell of a table too."""
    return _MARKS.sub(r"\\\g<0>", " ".join(str(text).split()).translate(_HTML))


def label(text: str) -> str:
    """A text on one line that matplotlib shows letter by letter: between two dollars it would set mathematics."""
    return " ".join(sound(text).split()).replace("$", r"\$")


def unlabelled(text: str) -> str:
    """The text that `label` made a label of."""
    return text.replace(r"\$", "$")


def sound(text: object) -> str:
    """A text with a mark in place of every character that XML, and so SVG, cannot hold."""
    return _NO_XML.sub("\ufffd", str(text))


def element(tag: str, *content: object, **attributes: object) -> Element:
    """An element of a page. Its texts are escaped when the tree is written, so none of them is ever markup.

    Args:
        tag: its name.
        content: elements, and texts between them.
        attributes: "class_" for class, "aria_label" for aria-label.
    """
    made = Element(tag, {key.rstrip("_").replace("_", "-"): sound(value) for key, value in attributes.items()})
    for part in content:
        if isinstance(part, Element):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + sound(part)
        else:
            made.text = (made.text or "") + sound(part)
    return made
