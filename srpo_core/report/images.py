"""Images as data URIs, small enough for a page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SIDE = 384  # pixels of the longer side, at most
_BYTES = 50_000  # larger files are compressed
_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


@dataclass
class Images:
    """Images as data URIs by their path, as many as fit.

    Attributes:
        folders: Where the relative paths of each file start.
        budget: Characters that all images may take.
        shown: The data URIs.
        used: Characters that they take.
        left_out: How many did not fit.
        missing: How many are not images that can be read.
    """

    folders: Sequence[Path]
    budget: int
    shown: dict[str, str] = field(default_factory=dict)
    used: int = 0
    left_out: int = 0
    missing: int = 0

    def add(self, image: str | None, file: int) -> str | None:
        """Embed an image of a file; the key under which the page finds it, None if there is none."""
        if image is None:
            return None
        key = f"{file}/{image}" if len(self.folders) > 1 else image
        if key not in self.shown:
            uri = _data_uri(self.folders[file] / image)
            if uri is None:
                self.missing += 1
                return None
            if self.used + len(uri) > self.budget:
                self.left_out += 1
                return None
            self.shown[key] = uri
            self.used += len(uri) + len(key) + 8
        return key


def _data_uri(path: Path) -> str | None:
    """A small copy of an image, or the file itself without Pillow; None if it is not an image that can be read."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError):
        return None
    kind = next((kind for signature, kind in _SIGNATURES.items() if content.startswith(signature)), None)
    if kind is None:
        return None
    try:
        from PIL import Image
    except ImportError:
        pass
    else:
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                if max(image.size) > _SIDE or len(content) > _BYTES:
                    image.thumbnail((_SIDE, _SIDE))
                    smaller = io.BytesIO()
                    image.convert("RGB").save(smaller, "JPEG", quality=82)
                    content, kind = smaller.getvalue(), "jpeg"
        except Exception:  # Pillow lets through whatever its decoders raise
            return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
