"""Every kind of file becomes the RGB that one sees, with either decoder, and broken ones are told apart."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dltrain.data.pictures import BadImage, Decoder, Picture

DECODERS: tuple[Decoder, ...] = ("pillow", "simplejpeg")


@pytest.fixture(params=DECODERS)
def decoder(request) -> Decoder:
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    return request.param


def photo(height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth, in colour, and different at every corner: uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [200 * y / height, 200 * x / width, 100 + 80 * np.sin(y / 9) * np.cos(x / 7)]
    return np.stack(planes, -1).astype(np.uint8)


def encoded(image: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, decoder: Decoder) -> np.ndarray:
    picture = Picture(data, decoder)
    pixels = picture.decode()
    assert pixels.dtype == np.uint8 and pixels.shape == (picture.height, picture.width, 3)
    return pixels.astype(int)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "PPM"])
def test_lossless(kind, decoder):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decoded(encoded(photo(), kind, **options), decoder), photo())


@pytest.mark.parametrize("options", [{"subsampling": s, "progressive": p} for s in (0, 1, 2) for p in (False, True)])
def test_jpeg_as_pillow_decodes_it(options, decoder):
    data = encoded(photo(), "JPEG", quality=90, **options)
    np.testing.assert_array_equal(decoded(data, decoder), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_is_repeated(kind, decoder):
    grey = photo()[..., 0]
    pixels = decoded(encoded(grey, kind), decoder)
    assert (pixels == pixels[..., :1]).all()
    assert abs(pixels[..., 0] - grey).max() <= (4 if kind == "JPEG" else 0)


def test_cmyk_is_not_inverted(decoder):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    assert abs(decoded(encoded(cmyk, "JPEG", quality=95), decoder) - [255, 0, 0]).max() <= 3


def test_alpha_is_over_white(decoder):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = 200, 0, 0, 255
    rgba[4:] = 0, 0, 0, 51  # a fifth of black
    pixels = decoded(encoded(rgba, "PNG"), decoder)
    assert (pixels[:4] == [200, 0, 0]).all() and abs(pixels[4:] - 204).max() <= 1


def test_palette_with_a_transparent_colour(decoder):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    pixels = decoded(encoded(image, "PNG", transparency=0), decoder)
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[3, 3].tolist() == [10, 20, 30]


def test_black_and_white(decoder):
    pixels = decoded(encoded(Image.fromarray(photo()[..., 0] > 99), "PNG"), decoder)
    np.testing.assert_array_equal(pixels[..., 2], np.where(photo()[..., 0] > 99, 255, 0))


def test_sixteen_bits_keep_the_upper_byte(decoder):
    grey = (photo()[..., 0].astype(np.uint16) << 8) + 77
    assert (decoded(encoded(grey, "PNG"), decoder) == photo()[..., :1]).all()


def test_sixteen_bits_of_colour(decoder):
    deep = (photo().astype(">u2") << 8) + 77
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in deep)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decoded(data, decoder), photo())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation, decoder):
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decoded(encoded(photo(), kind, exif=exif, quality=95), decoder)
    expected = turned[orientation](photo()).astype(int)
    assert pixels.shape == expected.shape
    assert abs(pixels - expected).mean() < 4


@pytest.mark.parametrize(("height", "width", "orientation"), [(201, 333, 1), (200, 328, 6)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_shrunk_jpeg(mode, height, width, orientation, decoder):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(photo(height, width)).convert(mode)
    data = encoded(image, "JPEG", quality=95, **({"exif": exif} if orientation > 1 else {}))
    whole = decoded(data, decoder)
    for shrink in (2, 4, 8):
        part = Picture(data, decoder).decode(shrink)
        assert part.shape == (-(-whole.shape[0] // shrink), -(-whole.shape[1] // shrink), 3)
        np.testing.assert_array_equal(part, Picture(data, "pillow").decode(shrink))
        box = (0, 0, part.shape[1] * shrink, part.shape[0] * shrink)
        averaged = Image.fromarray(whole.astype(np.uint8)).crop(box).reduce(shrink)
        inner = abs(part.astype(int) - np.asarray(averaged))[:-1, :-1]
        assert inner.max() <= 6


@pytest.mark.parametrize("options", [{"comment": b"hi"}, {"xmp": b"x" * 99}, {"icc_profile": b"\xff\xc0" * 999}, {}])
def test_headers_of_many_makes(options, decoder):
    """Also when a frame seems to begin inside another segment."""
    data = encoded(photo(33, 47), "JPEG", **options)
    np.testing.assert_array_equal(decoded(data, decoder), np.asarray(Image.open(io.BytesIO(data))))


def test_a_buffer_holds_the_pixels(decoder):
    buffer = np.empty(48 * 64 * 3 + 5, np.uint8)
    for data in (encoded(photo(), "JPEG"), encoded(photo(), "PNG"), encoded(photo(40, 30), "JPEG")):
        expected = Picture(data, decoder).decode()
        np.testing.assert_array_equal(Picture(data, decoder).decode(buffer=buffer), expected)
        np.testing.assert_array_equal(Picture(data, decoder).decode(2, buffer), Picture(data, decoder).decode(2))


def test_what_is_no_image_is_named(decoder):
    for data in (b"", b"text", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"GIF89a", bytes(1000)):
        with pytest.raises(BadImage, match="not an image in JPEG, PNG, WEBP, PPM"):
            Picture(data, decoder).decode()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "PPM"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_what_ends_early_is_bad(kind, part, decoder):
    data = encoded(photo(), kind)
    with pytest.raises(BadImage):
        Picture(data[: int(part * len(data))], decoder).decode()


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what is corrupt
def test_damage_ends_in_pixels_or_bad_image():
    """And with the same verdict and size from both decoders."""
    pytest.importorskip("simplejpeg")
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(photo(), kind) for kind in ("JPEG", "PNG", "WEBP")] + [encoded(photo(), "JPEG", exif=exif)]
    bad, reasons = 0, []
    for _ in range(60):
        for data in files:
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[random.integers(0, len(damaged), 3)] = random.integers(0, 256, 3)
            shapes = []
            for decoder in DECODERS:
                try:
                    shapes.append(Picture(damaged.tobytes(), decoder).decode().shape)
                except BadImage as error:
                    shapes.append(())
                    reasons.append(str(error))
            assert len(set(shapes)) == 1
            bad += shapes[0] == ()
    assert 20 < bad < 220
    assert all(reason and "\n" not in reason and "0x" not in reason for reason in reasons)


def test_an_image_too_large_to_be_true(decoder):
    data = encoded(photo(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    with pytest.raises(BadImage, match="decompression bomb"):
        Picture(data[:at] + struct.pack(">HH", 65000, 65000) + data[at + 4 :], decoder).decode()
