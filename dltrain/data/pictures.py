"""Encoded images to pixels: JPEG, PNG, WebP and PPM become upright RGB.

EXIF orientation is applied, grey is repeated, alpha is laid over white, 16-bit samples keep their upper byte, and CMYK
is taken as Adobe writes it (inverted) and converted without a colour profile.

simplejpeg, where it is installed, decodes JPEG in half of Pillow's time and to the same pixels: both are libjpeg-turbo.
CMYK, EXIF, XMP and all that it refuses are left to Pillow, so the two agree on what is broken.

Shapes: H height, W width, C = 3 channels.
"""

import io
import struct
from typing import Any, Literal

import numpy as np

from dltrain.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "PPM")
EXIF_ORIENTATION = 0x0112
LARGEST = 1 << 26  # pixels that simplejpeg is asked for; Pillow refuses what looks like a decompression bomb

# Markers of JPEG, ITU-T T.81, table B.1: the frames that simplejpeg decodes, and what may come before one.
FRAMES = frozenset((0xFFC0, 0xFFC1, 0xFFC2))  # baseline, sequential and progressive, Huffman-coded
TABLES = frozenset((0xFFC4, 0xFFDB, 0xFFDD, 0xFFE0, *range(0xFFE2, 0xFFF0), 0xFFFE))  # all but APP1: EXIF and XMP
_segment = struct.Struct(">HH").unpack_from  # marker, length
_frame = struct.Struct(">BHHB").unpack_from  # bits, height, width, components

Decoder = Literal["simplejpeg", "pillow"]


def decoder() -> Decoder:
    """What decodes JPEG here: simplejpeg if it is installed. UserError if not even Pillow is."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise UserError("reading images needs Pillow: pip install 'dltrain[images]'") from error
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        return "pillow"
    return "simplejpeg"


class BadImage(ValueError):
    """Bytes that are no image, or not a whole one: the reason in one line."""


class Picture:
    """An encoded image of which the header is read; decode it once. `height`, `width`: pixels of the upright image."""

    __slots__ = ("_data", "_image", "_orientation", "height", "width")

    def __init__(self, data: bytes, decoder: Decoder):
        """BadImage if there is no image in `data`."""
        self._data = data
        self._image: Any = None  # Pillow's, if it is Pillow that decodes
        self.height, self.width = _size_of_jpeg(data) if decoder == "simplejpeg" else (0, 0)
        if not self.height:
            self._open()

    def decode(self, shrink: int = 1, buffer: np.ndarray | None = None) -> np.ndarray:
        """uint8 [H, W, C]; of a JPEG ceil(H / shrink), ceil(W / shrink), `shrink` being 1, 2, 4 or 8.

        `buffer`: uint8 [>= H * W * C] where the result may lie, which is quicker than fresh memory for every image.

        Raises:
            BadImage: the image is broken or ends early.
        """
        if self._image is None:
            import simplejpeg

            try:
                if shrink == 1:
                    return simplejpeg.decode_jpeg(self._data, buffer=buffer)
                height, width = -(-self.height // shrink), -(-self.width // shrink)
                return simplejpeg.decode_jpeg(
                    self._data, buffer=buffer, min_height=height, min_width=width, min_factor=shrink
                )
            except ValueError:  # of small faults too, which Pillow lets pass
                self._open()
        return self._decode_with_pillow(shrink)

    def _open(self) -> None:
        from PIL import Image

        try:
            self._image = Image.open(io.BytesIO(self._data), formats=FORMATS)
            self.width, self.height = self._image.size
            self._orientation = self._image.getexif().get(EXIF_ORIENTATION, 1)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises whatever its readers meet
            raise BadImage(_reason(error)) from error
        if self._orientation in (5, 6, 7, 8):  # lies on its side
            self.width, self.height = self.height, self.width

    def _decode_with_pillow(self, shrink: int) -> np.ndarray:
        from PIL import Image, ImageOps

        try:
            image = self._image
            width, height = image.size
            image.draft(None, (max(1, width // shrink), max(1, height // shrink)))  # heeded by JPEG alone
            if self._orientation != 1:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            if image.has_transparency_data:
                paper = Image.new("RGBA", image.size, "white")
                paper.alpha_composite(image.convert("RGBA"))
                image = paper
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        except MemoryError:
            raise
        except Exception as error:
            raise BadImage(_reason(error)) from error


def _size_of_jpeg(data: bytes) -> tuple[int, int]:
    """Height and width of a JPEG that simplejpeg is to decode; (0, 0) of all else.

    A walk from marker to marker up to the frame, a third of the time of asking simplejpeg.
    """
    try:
        if data[:2] == b"\xff\xd8":
            at = 2
            while True:
                marker, length = _segment(data, at)
                if marker in FRAMES:
                    bits, height, width, components = _frame(data, at + 4)
                    good = bits == 8 and components in (1, 3) and width and height * width < LARGEST
                    return (height, width) if good else (0, 0)
                if marker not in TABLES:
                    break
                at += 2 + length
    except struct.error:
        pass  # ends early, as Pillow will say
    return 0, 0


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":  # whose text has an address in memory
        return f"not an image in {', '.join(FORMATS)}"
    return " ".join(str(error).split()) or type(error).__name__
