"""JSON as people write it: comments and trailing commas become blanks, and the rest stays strict.

`//`, `#` and `/* */` begin comments outside of strings. What is blanked keeps its length and its
lines, so that an error in what is left has the line and column of the file. Nothing else of HJSON
or JSON5 is read: text without quotes would turn `tru` into a string.
"""

from __future__ import annotations

import re

__all__ = ["blanked"]

# Both patterns take what is not closed to the end of the text: a second look for the end, from each
# further beginning, would take a time that grows with the square of the length.
_STRING = r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|#[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_COMMA = re.compile(rf"{_STRING}|,(?=\s*[}}\]])", re.DOTALL)


def blanked(text: str) -> str:
    """`text` with comments, and the commas behind a last element, as spaces."""
    bare = _COMMENT.sub(_blank_comment, text)
    return _COMMA.sub(lambda found: _blank_comma(found, bare), bare)


def _blank_comment(found: re.Match[str]) -> str:
    text = found[0]
    unclosed = text.startswith("/*") and (len(text) < 4 or not text.endswith("*/"))
    return text if unclosed or text.startswith('"') else re.sub(r"[^\n]", " ", text)


def _blank_comma(found: re.Match[str], text: str) -> str:
    before = found.start() - 1
    while before >= 0 and text[before].isspace():
        before -= 1
    # `[,]` and `[1,,]` have lost an element, which is no trailing comma
    closes = found[0] == "," and before >= 0 and text[before] not in "[{,:"
    return " " if closes else found[0]
