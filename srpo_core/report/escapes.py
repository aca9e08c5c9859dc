"""Characters that are invisible or that steer a screen, as visible escapes."""

import re

__all__ = ["escaped"]

# Controls, marks that reorder text, separators of lines, spaces without width, invisible operators, and tags. The page
# has the same in base.js. Halves of characters, which UTF-8 does not have, never reach the page.
_HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]"
)


def escaped(text: str, *, keep: str = "\n") -> str:
    r"""A text whose hidden characters are shown as escapes, so that they neither steer a terminal nor reorder a line.

    Args:
        text: What a model, or a file, may hold.
        keep: Hidden characters that stay as they are.

    Example:
        >>> print(escaped("a\x1b[31mb\u202ec"))
        a\x1b[31mb\u202ec
    """
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
