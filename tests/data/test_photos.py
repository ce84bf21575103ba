"""Photos from anywhere: what the network sees of good photos, and how bad ones are refused."""

import io
import os
import random
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import run_code

from cifar10_resnet.data import photos
from cifar10_resnet.data.photos import read_photo, read_photo_file
from cifar10_resnet.errors import UserError

# pytest shows the warnings that the module keeps from its users
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Returns a photo with four different corners, which JPEG hardly changes."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 255 * (x / width) * (1 - y / height)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def picture_or_refusal(data: bytes) -> np.ndarray | str:
    try:
        return read_photo(data, "a photo")
    except UserError as error:
        return str(error)


def assert_is_a_sentence(text: str) -> None:
    assert text.startswith("a photo ")
    assert text.endswith(".")
    assert "\n" not in text


def refusal(data: bytes) -> str:
    text = picture_or_refusal(data)
    assert isinstance(text, str)
    assert_is_a_sentence(text)
    return text


# --- Whole photos ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_a_photo_of_32x32_comes_through_untouched(kind):
    image = noise(32, 32)
    seen = read_photo(encoded(image, kind), "x")
    assert seen.dtype == np.uint8
    assert seen.flags.writeable
    np.testing.assert_array_equal(seen, image)


def triangle_weights(size: int) -> np.ndarray:
    """Returns each of `size` pixels' weight in each of 32, a tent two pixels wide: [32, size]."""
    scale = max(size / 32, 1)
    centres = (np.arange(32) + 0.5) * size / 32
    distance = np.abs(np.arange(size) + 0.5 - centres[:, None]) / scale
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (50, 91), (120, 33), (7, 5), (1, 1), (1, 300), (33, 32)]
)
def test_any_other_size_gives_its_middle_square_with_antialiasing(height, width):
    image = noise(height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side].astype(np.float64)
    weights = triangle_weights(side)
    expected = np.einsum("ya,xb,abc->yxc", weights, weights, square)
    seen = read_photo(encoded(image), "x")
    # rounded after each of two passes
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1.01)


def test_large_jpegs_are_unpacked_small_and_look_the_same():
    image = sum(  # coarse and fine structure, as photographs have
        np.asarray(Image.fromarray(noise(1500 // s, 2000 // s)).resize((2000, 1500)), float)
        for s in (2, 5, 30, 500)
    )
    data = encoded((image / 4).astype(np.uint8), "JPEG", quality=90)
    everything = encoded(Image.open(io.BytesIO(data)))  # its pixels in full size, as a PNG
    difference = read_photo(data, "x").astype(int) - read_photo(everything, "x")
    assert 0 < np.abs(difference).max() <= 2


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda image: image),
        (2, lambda image: image[:, ::-1]),
        (3, lambda image: image[::-1, ::-1]),
        (4, lambda image: image[::-1]),
        (5, lambda image: image.swapaxes(0, 1)),
        (6, lambda image: np.rot90(image, 1)),
        (7, lambda image: np.rot90(image.swapaxes(0, 1), 2)),
        (8, lambda image: np.rot90(image, -1)),
        (9, lambda image: image),
        (0, lambda image: image),
    ],
)
def test_a_photo_is_turned_as_its_exif_says(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Stored rotated, as by a camera held sideways. Orientation 6 means: rotate it clockwise.
    upright = smooth(32, 32)
    stored = np.ascontiguousarray(turn(upright))
    np.testing.assert_array_equal(read_photo(encoded(stored, exif=exif), "x"), upright)
    seen = read_photo(encoded(stored, "JPEG", exif=exif, quality=95), "x").astype(int)
    assert np.abs(seen - upright).max() <= 12


def test_exif_that_makes_no_sense_does_not_cost_the_photo():
    image = noise(32, 32)
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0" + b"\xff" * 40):
        np.testing.assert_array_equal(read_photo(encoded(image, exif=exif), "x"), image)


def test_colour_models_come_out_as_rgb():
    grey = noise(32, 32)[:, :, 0]
    for image in (Image.fromarray(grey), Image.fromarray(grey).convert("LA")):
        np.testing.assert_array_equal(
            read_photo(encoded(image), "x"), np.repeat(grey[:, :, None], 3, axis=2)
        )
    bits = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(
        read_photo(encoded(bits), "x")[:, :, 1], np.where(np.asarray(bits), 255, 0)
    )
    palette = Image.fromarray(smooth(32, 32)).quantize(16)
    for kind in ("PNG", "BMP"):
        np.testing.assert_array_equal(
            read_photo(encoded(palette, kind), "x"), np.asarray(palette.convert("RGB"))
        )
    cmyk = Image.fromarray(smooth(64, 64)).convert("CMYK")
    seen = read_photo(encoded(cmyk, "JPEG", quality=95), "x").astype(int)
    assert np.abs(seen - read_photo(encoded(smooth(64, 64)), "x")).max() <= 8


def test_transparency_is_ignored():
    image = noise(32, 32, 4)
    np.testing.assert_array_equal(read_photo(encoded(image), "x"), image[:, :, :3])


def test_sixteen_bits_are_brought_to_eight():
    grey = np.random.default_rng(0).integers(0, 2**16, (32, 32), np.uint16)
    seen = read_photo(encoded(grey), "x")
    np.testing.assert_array_equal(seen, np.repeat((grey >> 8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "LA", "RGBA"])
def test_sixteen_bits_of_colour_and_transparency_are_brought_to_eight(kind, channels):
    image = np.random.default_rng(0).integers(0, 2**16, (32, 32, channels), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        check = struct.pack(">I", zlib.crc32(name + data))
        png += struct.pack(">I", len(data)) + name + data + check
    colours = image[:, :, :3] if channels > 2 else image[:, :, :1].repeat(3, axis=2)
    np.testing.assert_array_equal(read_photo(png, "x"), colours >> 8)


def test_the_first_photo_of_several_is_taken():
    first, second = (Image.fromarray(a) for a in (smooth(32, 32), 255 - smooth(32, 32)))
    animated = encoded(first, save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_photo(animated, "x"), smooth(32, 32))
    two_in_a_jpeg = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(read_photo(two_in_a_jpeg, "x").astype(int) - smooth(32, 32)).max() <= 12


def test_the_bytes_count_and_not_the_files_name(tmp_path):
    file = tmp_path / "photo.bmp"
    file.write_bytes(encoded(noise(32, 32)))
    np.testing.assert_array_equal(read_photo_file(str(file)), noise(32, 32))


# --- Refused ones ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"just text",
        b"\xff\xd8",
        b"\x89PNG\r\n\x1a\n",
        b"BM",
        b"\0" * 1000,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encoded(smooth(32, 32), "GIF"),
        encoded(smooth(32, 32), "TIFF"),
        encoded(smooth(32, 32), "PPM"),
        encoded(smooth(32, 32), "WEBP"),
    ],
    ids=["text", "jpeg", "png", "bmp", "zeros", "svg", "GIF", "TIFF", "PPM", "WebP"],
)
def test_what_is_no_photo_or_of_another_kind_is_refused(data):
    assert "JPEG, PNG or BMP" in refusal(data) or "damaged" in refusal(data)


def test_an_empty_file_and_a_missing_one_are_reported(tmp_path):
    (tmp_path / "empty.png").touch()
    for name, reason in (
        ("empty.png", "is empty"),
        ("none.png", "No such file"),
        (".", "directory"),
    ):
        with pytest.raises(UserError, match=reason) as refused:
            read_photo_file(str(tmp_path / name))
        assert str(tmp_path) in str(refused.value)


def samples() -> dict[str, bytes]:
    image = Image.fromarray(noise(24, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a maker"
    return {
        "jpeg": encoded(image, "JPEG", exif=exif),
        "progressive": encoded(image, "JPEG", progressive=True),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "png": encoded(image, exif=exif),
        "palette": encoded(image.convert("P")),
        "16 bits": encoded(noise(24, 40, 2).view(np.uint16)[:, :, 0]),
        "animation": encoded(image, save_all=True, append_images=[image.rotate(180)]),
        "bmp": encoded(image, "BMP"),
        "two in a jpeg": encoded(image, "MPO", save_all=True, append_images=[image]),
    }


@pytest.mark.parametrize("kind", samples())
def test_a_photo_cut_off_anywhere_is_refused_or_whole(kind):
    data = samples()[kind]
    whole = read_photo(data, "x")
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 150)):
        seen = picture_or_refusal(data[:length])
        if isinstance(seen, str):
            assert_is_a_sentence(seen)
            refused += 1
        else:
            np.testing.assert_array_equal(seen, whole)
    # what follows the pixels may be missing: a second photo, the end mark
    assert refused > (50 if kind in ("animation", "two in a jpeg") else 140)


def with_right_checksums(png: bytes) -> bytes:
    out, place = png[:8], 8
    while place + 12 <= len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        body = png[place + 4 : place + 8 + size]
        out += png[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + size
    return out


@pytest.mark.parametrize("kind", samples())
def test_changed_bytes_give_a_photo_or_a_one_line_error(kind):
    data, rng = samples()[kind], random.Random(kind)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 2, 10))):
            changed[rng.randrange(rng.choice((60, len(data))))] = rng.randrange(256)
        changed = bytes(changed)
        if changed.startswith(b"\x89PNG") and rng.random() < 0.7:
            changed = with_right_checksums(changed)
        seen = picture_or_refusal(changed)
        if isinstance(seen, str):
            assert_is_a_sentence(seen)
        else:
            assert seen.shape == (32, 32, 3)


def png_that_claims(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return encoded(noise(8, 8)).replace(
        encoded(noise(8, 8))[12:33], head + struct.pack(">I", zlib.crc32(head))
    )


@pytest.mark.parametrize(
    ("width", "height"), [(8000, 8000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)]
)
def test_more_pixels_than_are_read_are_refused_by_what_the_file_claims(width, height):
    assert "50,000,000" in refusal(png_that_claims(width, height))


def test_a_file_of_more_bytes_than_are_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "MAX_BYTES", 2**20)
    file = tmp_path / "x.bmp"
    with open(file, "wb") as opened:
        opened.truncate(2**20 + 1)
    with pytest.raises(UserError, match="larger than 1 MiB"):
        read_photo_file(str(file))


def test_a_jpeg_of_endless_scans_is_refused():
    data = encoded(noise(64, 64), "JPEG", progressive=True)
    last_scan = data[data.rfind(b"\xff\xda") : -2]
    read_photo(data[:-2] + 80 * last_scan + data[-2:], "x")
    assert "scans" in refusal(data[:-2] + 100 * last_scan + data[-2:])


MEMORY = """
import io, resource, sys
from PIL import Image
from cifar10_resnet.data.photos import read_photo

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

read_photo(open(sys.argv[1], "rb").read(), "x")
small = peak()
for file in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")
    try:
        read_photo(open(file, "rb").read(), "x")
    except Exception as error:
        print(error, file=sys.stderr)
    print(round(peak() - small))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through /proc")
def test_memory_stays_bounded_whatever_a_file_unpacks_to(tmp_path):
    plain = encoded(Image.new("L", (1, 1)))
    note = b"zTXtkey\0\0" + zlib.compress(bytes(2**27), 1)
    note = struct.pack(">I", len(note) - 4) + note + struct.pack(">I", zlib.crc32(note))
    cases = {
        "small.png": encoded(noise(32, 32)),
        "photo.jpg": encoded(Image.new("RGB", (5000, 5000)), "JPEG"),
        "large.png": encoded(Image.new("RGB", (4000, 4000)), compress_level=1),
        "claims.png": png_that_claims(30_000, 30_000),
        "text.png": plain[:33] + note + plain[33:],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    printed = run_code(MEMORY, *(tmp_path / name for name in cases)).stdout
    grown = dict(zip(list(cases)[1:], map(int, printed.split()), strict=True))
    assert grown["photo.jpg"] < 40, "a photo is unpacked at an eighth of its size"
    assert grown["large.png"] < 160, "twice 16 million pixels of four bytes"
    assert grown["claims.png"] < 40
    assert grown["text.png"] < 80


# --- Threads --------------------------------------------------------------------------------------


def test_threads_see_what_one_thread_sees_and_hold_one_large_photo_at_a_time(monkeypatch):
    monkeypatch.setattr(photos, "LARGE_PIXELS", 1000)
    files = [encoded(noise(40 + i, 50)) for i in range(12)] + [encoded(noise(32, 31))] * 4
    alone = [read_photo(file, "x") for file in files]
    at_work, most = [], []
    unwatched = photos._middle

    def watched(image: Image.Image) -> Image.Image:
        if image.width * image.height > 1000:
            at_work.append(threading.get_ident())
            most.append(len(at_work))
        small = unwatched(image)
        if image.width * image.height > 1000:
            at_work.remove(threading.get_ident())
        return small

    monkeypatch.setattr(photos, "_middle", watched)
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(alone, pool.map(read_photo, files, "x" * 16), strict=True):
            np.testing.assert_array_equal(one, other)
    assert most == [1] * 12


def test_no_warning_of_pillows_reaches_the_user(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x0f\x01\x02\0\xff\0\0\0\xff\xff\xff\0"
    (tmp_path / "x.jpg").write_bytes(encoded(smooth(32, 32), "JPEG", exif=exif))
    code = "import sys; from cifar10_resnet.data import photos; photos.read_photo_file(sys.argv[1])"
    photo, noisy = tmp_path / "x.jpg", os.environ | {"PYTHONWARNINGS": "always"}
    assert run_code(code, photo, env=noisy).stderr == ""
