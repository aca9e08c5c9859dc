"""Any image that a trainer may have, as a PNG file or as the path of its file."""

import base64
import binascii
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from srpo_core.rollouts.values import Unwritable

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of Pillow, that a PNG file holds and a browser shows
_ALPHA_MODES = ("La", "PA", "RGBa")
_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # of PNG, by the number of channels
_SCALE_255 = 16.0  # floats above it are not in [0, 1], however they were resized or normalized


class Picture(NamedTuple):
    """An image that is not a file yet: a name made from its content, and a function that encodes it as PNG."""

    name: str
    encode: Callable[[], bytes]


def picture(image: Any) -> str | Picture | None:
    """The path of an image, or the image itself if it has no path; None if there is no image.

    Args:
        image: A path or an address; an image of Pillow; an array or a tensor; encoded bytes; or the record of an image
            in a data set, such as ``{"bytes": ..., "path": ...}``.

    Raises:
        Unwritable: If the image is none of these, or has no pixels.
    """
    if image is None or (isinstance(image, str) and not image):
        return None
    if isinstance(image, str) and image.startswith("data:"):
        try:
            return picture(base64.b64decode(image.partition(",")[2], validate=True))
        except binascii.Error:
            raise Unwritable("a data: address that is not base64") from None
    if isinstance(image, str | os.PathLike):
        return os.fsdecode(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return _of_file(bytes(image))
    if isinstance(image, Mapping):
        held = [image[key] for key in ("bytes", "path", "image", "image_url", "url") if image.get(key) is not None]
        if not held:
            raise Unwritable("an object without bytes or path")
        return picture(held[0])
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        return _of_array((image.double() if image.is_floating_point() else image).numpy(), channels_first=True)
    if hasattr(image, "convert") and hasattr(image, "mode"):  # Pillow's
        return _of_pillow(image)
    if hasattr(image, "__array__") and not isinstance(image, Sequence):
        return _of_array(np.asarray(image), channels_first=False)
    raise Unwritable(f"a {type(image).__name__}, which is no image")


def _of_file(content: bytes) -> Picture:
    try:
        from PIL import Image
    except ImportError:
        raise Unwritable("encoded bytes, which need Pillow: pip install pillow") from None
    return _of_pillow(Image.open(io.BytesIO(content)))


def _of_pillow(image: Any) -> Picture:
    image.load()  # images are read when they are needed
    if image.mode == "F" or image.mode.startswith("I"):
        return _of_array(np.asarray(image), channels_first=False)
    if 0 in image.size:
        raise Unwritable("an image without pixels")
    if image.mode not in _PNG_MODES:
        image = image.convert("RGBA" if image.mode in _ALPHA_MODES else "RGB")
        image.info = {}  # a profile of the colors before
    palette = (image.getpalette(), image.info.get("transparency")) if image.mode == "P" else None

    def encode() -> bytes:
        file = io.BytesIO()
        try:
            image.save(file, "PNG")
        except Exception:  # what came with the image does not fit into a PNG file: the pixels do
            plain = image.convert("RGB")
            plain.info = {}
            file = io.BytesIO()
            plain.save(file, "PNG")
        return file.getvalue()

    return Picture(_name(image.tobytes(), image.mode, image.size, palette), encode)


def _of_array(pixels: NDArray[Any], *, channels_first: bool) -> Picture:
    while pixels.ndim > 3 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or not {pixels.shape[0], pixels.shape[2]} & set(_COLOR_TYPES):
        raise Unwritable("an array that is not of 1, 3 or 4 channels, height and width")
    first, last = pixels.shape[0] in _COLOR_TYPES, pixels.shape[2] in _COLOR_TYPES
    if first and (channels_first or not last):
        pixels = np.moveaxis(pixels, 0, 2)
    if not pixels.size:
        raise Unwritable("an image without pixels")
    in_bytes = np.ascontiguousarray(_bytes(pixels))
    return Picture(_name(in_bytes.tobytes(), in_bytes.shape), lambda: _png(in_bytes))


def _bytes(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Any numbers as bytes: floats are in [0, 1] or up to 255, whole numbers have one or two bytes."""
    if pixels.dtype == np.uint8:
        return pixels
    kind = pixels.dtype.kind
    if kind not in "biuf":
        raise Unwritable("an array of no real numbers")
    pixels = np.nan_to_num(pixels.astype(np.float64), nan=0.0)
    if kind == "b" or (kind == "f" and pixels.max() <= _SCALE_255):
        pixels = pixels * 255
    elif kind != "f" and pixels.max() > 255:
        pixels = pixels // 256
    return np.rint(pixels.clip(0, 255)).astype(np.uint8)


def _name(content: bytes, *about: Any) -> str:
    return hashlib.sha256(content + repr(about).encode()).hexdigest()[:16]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A [height, width, channel] image as a PNG file."""
    height, width, channels = pixels.shape
    # Each line begins with the number of its filter: 0, none.
    scanlines = np.pad(pixels.reshape(height, width * channels), ((0, 0), (1, 0))).tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")


def save(image: Picture, folder: Path) -> Path:
    """Write an image into a folder, whole or not at all."""
    path = folder / f"{image.name}.png"
    content = image.encode()
    folder.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
