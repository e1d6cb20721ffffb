# SPDX-License-Identifier: Apache-2.0
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from internimage_deploy import UserError
from internimage_deploy.runtime.imaging.image_io import decode_image, opened, read_image

RGB = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)
GREY = RGB[:, :, 0]


def save(tmp_path, image, name="a.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_rgb_is_exact(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path, Image.fromarray(RGB))), RGB)


def test_grey_is_repeated(tmp_path):
    expected = np.repeat(GREY[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(read_image(save(tmp_path, Image.fromarray(GREY))), expected)


def test_one_bit(tmp_path):
    image = read_image(save(tmp_path, Image.fromarray(GREY > 20)))
    np.testing.assert_array_equal(image[:, :, 0], np.where(GREY > 20, 255, 0))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_keeps_its_upper_byte(tmp_path, suffix):
    values = np.array([[0, 255, 256], [0x1234, 0x80FF, 0xFFFF]], np.uint16)
    image = read_image(save(tmp_path, Image.fromarray(values), f"a.{suffix}"))
    np.testing.assert_array_equal(image, np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_alpha_is_dropped_not_blended(tmp_path):
    rgba = np.dstack([RGB, np.zeros_like(GREY)])
    np.testing.assert_array_equal(read_image(save(tmp_path, Image.fromarray(rgba))), RGB)
    grey_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (9, 6), 0)])
    np.testing.assert_array_equal(read_image(save(tmp_path, grey_alpha))[:, :, 1], GREY)


def test_palette_and_its_transparency(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="L").convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]]
    np.testing.assert_array_equal(read_image(save(tmp_path, palette)), expected)
    np.testing.assert_array_equal(read_image(save(tmp_path, palette, "b.png", transparency=1)), expected)
    np.testing.assert_array_equal(read_image(save(tmp_path, palette, "c.gif")), expected)


def test_cmyk_jpeg(tmp_path):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(read_image(save(tmp_path, red, "a.jpg", quality=100)).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_jpeg_is_decoded_as_mmsegmentation_does_with_opencv(tmp_path, subsampling):
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.uniform(0, 255, (9, 13, 3)).astype(np.float32), (131, 93), interpolation=cv2.INTER_CUBIC)
    scene = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    path = save(tmp_path, Image.fromarray(scene), "a.jpg", quality=85, subsampling=subsampling)
    np.testing.assert_array_equal(read_image(path), cv2.imread(str(path))[:, :, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    # EXIF states which side of the scene the stored row 0 and column 0 show.
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, 1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turned[orientation]))
    np.testing.assert_array_equal(read_image(save(tmp_path, stored, exif=exif)), RGB)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_cut_exif_block_leaves_the_picture_as_it_is_stored(tmp_path, name):
    path = save(tmp_path, Image.fromarray(RGB), name, exif=b"Exif\0\0MM\0*", quality=100, lossless=True)
    assert read_image(path).shape == RGB.shape
    if name != "a.jpg":
        np.testing.assert_array_equal(read_image(path), RGB)


@pytest.mark.parametrize("error", [struct.error("needs 8 bytes"), KeyError("none"), ZeroDivisionError(), MemoryError()])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    def load(self):
        raise error

    path = save(tmp_path, Image.fromarray(RGB))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(UserError, match=r"a\.png: (cannot be read as an image|not enough memory)"):
        read_image(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp", "a.bmp", "a.gif"])
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9], ids="cut at {}".format)
def test_truncated_files_are_named(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(noise), name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=name) as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"not an image at all")
    with pytest.raises(UserError, match="not an image in a known format"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "b.jpg")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)
    floats = save(tmp_path, Image.fromarray(np.ones((4, 4), np.float32)), "f.tif")
    with pytest.raises(UserError, match="floating-point"):
        read_image(floats)
    # EPS would make Pillow start Ghostscript.
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="not an image in a known format"):
        read_image(tmp_path / "a.png")


def test_the_pixel_limit_is_checked_before_decoding(tmp_path):
    with pytest.raises(UserError, match=r"54 pixels, the limit is 53; raise it with --max-pixels"):
        read_image(save(tmp_path, Image.fromarray(RGB)), max_pixels=53)
    assert read_image(tmp_path / "a.png", max_pixels=54).shape == (6, 9, 3)


def png_header(width, height):
    """A PNG file that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_bomb_of_a_few_bytes_is_refused_by_its_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(100_000, 100_000))
    with pytest.raises(UserError, match="10,000,000,000 pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("error")
def test_sizes_above_pillows_own_limit_are_read():
    with opened(png_header(20_000, 10_000), "bomb") as (image, structure):
        assert image.size == (structure.width, structure.height) == (20_000, 10_000)
    with pytest.raises(UserError, match="the body: not an image in a known format"):
        decode_image(b"nothing", what="the body")


def test_pillows_own_limit_is_left_as_it_was(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    read_image(save(tmp_path, Image.fromarray(RGB)))
    assert before is not None
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks about the damage
def test_any_damage_gives_an_image_or_one_line(tmp_path):
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    outcomes = set()
    for kind in ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "PPM"):
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        for _ in range(25):
            data = bytearray(buffer.getvalue())
            for position in rng.integers(0, min(len(data), 400), 6):
                data[position] = rng.integers(256)
            path = tmp_path / "x.bin"
            path.write_bytes(data)
            try:
                outcomes.add(read_image(path, max_pixels=10_000).ndim)
            except UserError as error:
                outcomes.add("many lines" if "\n" in str(error) else "one line")
    assert outcomes == {3, "one line"}
