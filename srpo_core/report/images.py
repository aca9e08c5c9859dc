"""Images as data URIs that are small enough for a page."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Images"]

_SIDE = 384  # pixels of the longer side, at most
_BYTES = 50_000  # larger files are compressed
_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
_NAMED = 3  # of the images that a sentence is about

_NOT_FOUND = "not found"
_ADDRESS = "on the network, from which the page loads nothing"
_UNREADABLE = "not readable as PNG, JPEG, GIF or WebP"
_OUTSIDE = "outside of the folder of the rollout file"
_REMEDIES = {
    _NOT_FOUND: "relative paths start at the folder of the rollout file",
    # A file of somebody else could otherwise put any picture of the reader's disk into a page that is passed on.
    _OUTSIDE: "pass --image-folder with a folder from which images may be shown",
}
_MAX_BYTES = 2**26  # of a file
_MAX_PIXELS = 2**25  # a small file may hold many


@dataclass
class Images:
    """Images as data URIs by their path, as many as fit.

    Attributes:
        folders: Where the relative paths of each file start.
        budget: Number of characters that all images may take.
        allowed: Further folders that images may lie in.
        shown: The data URIs.
        used: Number of characters that they take.
        left_out: The images that did not fit.
        missing: Why each other image is not shown.
    """

    folders: Sequence[Path]
    budget: int
    allowed: Sequence[Path] = ()
    shown: dict[str, str] = field(default_factory=dict)
    used: int = 0
    left_out: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, image: str | None, file: int) -> str | None:
        """Embed an image of a file; the key under which the page finds it, None if it is not shown."""
        if image is None:
            return None
        key = f"{file}/{image}" if len(self.folders) > 1 else image
        if key in self.shown:
            return key
        if key in self.missing:
            return None
        found = _data_uri(self.folders[file], image, self.allowed)
        if found in (_NOT_FOUND, _ADDRESS, _UNREADABLE, _OUTSIDE):
            self.missing[key] = found
            return None
        if self.used + len(found) > self.budget:
            self.left_out.add(key)
            return None
        self.left_out.discard(key)
        self.shown[key] = found
        self.used += len(found) + len(key) + 8
        return key

    def missing_in_words(self) -> str:
        """How many images are missing, which and why, in one sentence; empty if none is.

        Example:
            >>> images = Images([Path("no/such/folder")], budget=1000)
            >>> _ = images.add("a.png", 0)
            >>> images.missing_in_words()
            '1 of 1 images was not found: a.png (relative paths start at the folder of the rollout file).'
        """
        total = len(self.shown) + len(self.left_out) + len(self.missing)
        parts = []
        for reason in dict.fromkeys(self.missing.values()):
            keys = [key for key, its in self.missing.items() if its == reason]
            more = f" and {len(keys) - _NAMED:,} more" if len(keys) > _NAMED else ""
            remedy = f" ({_REMEDIES[reason]})" if reason in _REMEDIES else ""
            be = "was" if len(keys) == 1 else "were"
            of = f" of {total:,} images" if not parts else ""
            parts.append(f"{len(keys):,}{of} {be} {reason}: {', '.join(keys[:_NAMED])}{more}{remedy}")
        return "; ".join(parts) + "." if parts else ""


def _data_uri(folder: Path, image: str, allowed: Sequence[Path]) -> str:
    """A small copy of an image, or the file itself without Pillow; else one of the reasons why it cannot be shown."""
    if re.match(r"(?i)(https?|ftp|s3|gs)://", image):
        return _ADDRESS
    try:
        path = (folder / image).resolve()
        if not any(path.is_relative_to(each.resolve()) for each in (folder, *allowed)):
            return _OUTSIDE
        if not path.is_file():  # nor a pipe, which would be waited for
            return _NOT_FOUND
        if path.stat().st_size > _MAX_BYTES:
            return _UNREADABLE
        content = path.read_bytes()
    except (OSError, ValueError, RuntimeError):
        return _NOT_FOUND
    kind = next((kind for signature, kind in _SIGNATURES.items() if content.startswith(signature)), None)
    if kind is None:
        return _UNREADABLE
    try:
        from PIL import Image
    except ImportError:
        pass
    else:
        try:
            with Image.open(io.BytesIO(content)) as opened:
                if opened.size[0] * opened.size[1] > _MAX_PIXELS:
                    return _UNREADABLE
                opened.load()
                if max(opened.size) > _SIDE or len(content) > _BYTES:
                    opened.thumbnail((_SIDE, _SIDE))
                    smaller = io.BytesIO()
                    opened.convert("RGB").save(smaller, "JPEG", quality=82)
                    content, kind = smaller.getvalue(), "jpeg"
        except Exception:  # Pillow lets through whatever its decoders raise
            return _UNREADABLE
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
