"""Reads photos of any size as images for the network: 32x32 pixels, uint8.

Pillow reads the photos, which come from anywhere. A photo's bytes, pixels and scans are
counted before its pixels are unpacked, so memory and time stay bounded.
"""

import base64
import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import ExifTags, Image

from cifar10_resnet.errors import UserError, unreadable
from cifar10_resnet.formats import SIDE

FORMATS = ("JPEG", "PNG", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
# A JPEG has one scan or a dozen. A scan of few bytes takes as long to read as the whole photo.
MAX_SCANS = 100
SCAN = re.compile(rb"\xff\xda\x00[\x06\x08\x0a\x0c][\x01-\x04]")

# Many threads may read photos, but only one at a time has a large photo in memory.
LARGE_PIXELS = 16_000_000
LARGE = threading.Lock()

# These undo EXIF's orientations.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns of harmless oddities. Here a photo is read, or refused with a one-line error.
warnings.filterwarnings("ignore", module="PIL")


def read_photos(paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray | UserError]]:
    """Yields each photo's path with its image or its error. A path may be a folder of photos."""
    for path in paths:
        try:
            if os.path.isdir(path):
                yield from read_photos(os.path.join(path, name) for name in _photos_in(path))
            else:
                yield path, read_photo_file(path)
        except UserError as error:
            yield path, error


def _photos_in(folder: str) -> list[str]:
    try:
        names = [
            name
            for name in os.listdir(folder)
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    except OSError as error:
        raise unreadable(folder, error) from error
    if not names:
        raise UserError(f"{folder} contains no photo. Use a folder with JPEG, PNG or BMP files.")
    return sorted(names)


def read_photo_file(path: str) -> np.ndarray:
    """Returns a photo as an image for the network. Refuses other files with a one-line error."""
    try:
        with open(path, "rb") as file:
            encoded = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    return read_photo(encoded, path)


def read_photo(encoded: bytes, name: str) -> np.ndarray:
    """Returns a photo as uint8 [32, 32, 3]: its centre square, scaled, rotated by EXIF.

    `name` is the photo's name in error messages. Transparency is ignored, and 16-bit photos are
    reduced to 8 bits. An animation is read as its first frame.
    """
    return unpacked(opened(encoded, name), name)


def opened(encoded: bytes, name: str) -> Image.Image:
    """Returns a photo whose size is known and whose pixels are still packed."""
    if not encoded:
        raise UserError(f"{name} is empty. Use a JPEG, PNG or BMP photo.")
    if len(encoded) > MAX_BYTES:
        raise UserError(f"{name} is larger than {MAX_BYTES >> 20} MiB. Use a smaller photo.")
    with _refusing_damage(name):
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{name} has {image.width} x {image.height} pixels. Use up to {MAX_PIXELS:,}."
        )
    if image.format in ("JPEG", "MPO") and len(SCAN.findall(encoded)) > MAX_SCANS:
        raise UserError(f"{name} is a JPEG with over {MAX_SCANS} scans. Save it with fewer.")
    return image


def unpacked(image: Image.Image, name: str) -> np.ndarray:
    """Returns an opened photo as an image for the network, and closes the photo."""
    is_large = image.width * image.height > LARGE_PIXELS
    with contextlib.closing(image):  # this frees its pixels too
        with LARGE if is_large else contextlib.nullcontext():
            with _refusing_damage(name):
                # A large JPEG is unpacked at a half to an eighth of its size, in a fraction of the
                # memory and time. At 16 times the final size, it hardly shows: 2 levels of 255.
                image.draft("RGB", (16 * SIDE, 16 * SIDE))
                image.load()
            small = _middle(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        turn = TURNS.get(_orientation(image))
    return np.array(small if turn is None else small.transpose(turn))


def data_url(image: np.ndarray) -> str:
    """Returns an image as the address of a PNG that a page can contain."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    return png_url(png.getvalue())


def png_url(png: bytes) -> str:
    """Returns a PNG file as an address that a page can contain."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


@contextlib.contextmanager
def _refusing_damage(name: str) -> Iterator[None]:
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name} is not a JPEG, PNG or BMP photo. Convert it to JPEG.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has too many pixels. Use up to {MAX_PIXELS:,}.") from error
    except Exception as error:  # Damaged bytes can make Pillow raise anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is a damaged photo: {reason}.") from error


def _middle(image: Image.Image) -> Image.Image:
    """Returns the centre square of a photo, in 8-bit RGB."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if square.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would clip
        square = Image.fromarray((np.asarray(square) >> 8).astype(np.uint8))
    return square if square.mode == "RGB" else square.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF, but intact pixels
        return 1
