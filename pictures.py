"""From picture files of any size to what the network sees: 32x32 pixels, uint8.

Pillow reads them, and files come from anywhere: what a file says it holds is checked before its
pixels are unpacked, so that memory stays bounded whatever it claims.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from errors import UserError

SIDE = 32
FORMATS = ("JPEG", "PNG", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000


def read_picture_file(path: str) -> np.ndarray:
    """Reads a picture file as the network sees it; refuses, in a sentence, what is not one."""
    try:
        with open(path, "rb") as file:
            encoded = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    return read_picture(encoded, path)


def read_picture(encoded: bytes, name: str) -> np.ndarray:
    """An encoded picture as uint8 [32, 32, 3]: turned as its EXIF says, its middle square, resized.

    `name` is what to call the picture in the sentence that refuses it. Transparency is ignored,
    16-bit pictures are brought to 8 bits, and of an animation the first picture is taken.
    """
    if not encoded:
        raise UserError(f"{name} is empty.")
    if len(encoded) > MAX_BYTES:
        raise UserError(f"{name} is larger than {MAX_BYTES >> 20} MiB, the limit for one picture.")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # of harmless oddities: a sentence or a picture
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(
                    f"{name} has {width} x {height} pixels; up to {MAX_PIXELS:,} are read."
                )
            return _middle(_rgb(ImageOps.exif_transpose(image)))
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name} is not a JPEG, PNG or BMP picture.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has too many pixels; up to {MAX_PIXELS:,} are read.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's readers raise
        raise UserError(f"{name} is a damaged picture: {error}.") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would clip
        values = np.clip(np.asarray(image, np.int64), 0, 65535) >> 8
        image = Image.fromarray(values.astype(np.uint8))
    return image.convert("RGB")


def _middle(image: Image.Image) -> np.ndarray:
    """The square in the middle of a picture at 32x32, with antialiasing."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
