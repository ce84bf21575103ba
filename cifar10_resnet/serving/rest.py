"""Answers TensorFlow Serving's REST requests for predictions.

A request has its images either in rows (`instances`) or in columns (`inputs`). The answer has the
same form: `predictions` or `outputs`.
"""

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from cifar10_resnet.data.photos import opened, unpacked
from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import SIDE
from cifar10_resnet.serving.saved_network import DEFAULT, SavedNetwork

MAX_INSTANCES = 256
# The JSON of MAX_INSTANCES images has fewer commas and opening brackets, even in the longest form.
# Each makes an object in memory that is several times as large as its text in the request.
MAX_MARKS = MAX_INSTANCES * (SIDE * SIDE * 3 + SIDE * SIDE + SIDE + 8)

# It takes a number of pixels before they are unpacked, and may raise an error.
Admit = Callable[[int], None]


def predict(network: SavedNetwork, body: bytes, admit: Admit) -> dict[str, Any]:
    """Returns the answer to a request's body. Refuses an invalid body with a one-line error."""
    request = _parse(body)
    signature = request.get("signature_name") or DEFAULT
    if not isinstance(signature, str) or signature not in network.inputs:
        known = ", ".join(sorted(network.inputs))
        raise UserError(f"The signature {signature!r:.60} is invalid: it must be one of {known}.")
    name, dtype = network.inputs[signature].name, network.inputs[signature].dtype
    if ("instances" in request) == ("inputs" in request):
        raise UserError("The request must have either 'instances' (rows) or 'inputs' (columns).")
    rowwise = "instances" in request
    values = request["instances"] if rowwise else _unnamed(request["inputs"], name, "'inputs'")
    if not isinstance(values, list) or not 0 < len(values) <= MAX_INSTANCES:
        raise UserError(f"Send a list of one or more images, up to {MAX_INSTANCES} in a request.")
    if rowwise:
        values = [_unnamed(value, name, f"instance {i}") for i, value in enumerate(values)]
    if dtype == "string":
        # The graph would decode any photo, no matter how much memory it takes. `opened` checks a
        # photo first, and `unpacked` gives the same pixels as everywhere in this project.
        outputs = network(_photos(values, admit))
    else:
        outputs = network(_pixels(values, dtype.as_numpy_dtype), signature)
    columns = {key: _plain(value) for key, value in outputs.items()}
    if not rowwise:
        return {"outputs": columns}
    rows = zip(*columns.values(), strict=True)
    return {"predictions": [dict(zip(columns, row, strict=True)) for row in rows]}


def _parse(body: bytes) -> dict[str, Any]:
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_MARKS:
        raise UserError(f"The request has too many values. Send up to {MAX_INSTANCES} images.")
    try:
        request = json.loads(body, parse_constant=str)  # NaN is as wrong as a text
    except (ValueError, RecursionError) as error:
        raise UserError(f"The request is not JSON: {error}.") from error
    if not isinstance(request, dict):
        raise UserError("The request is not a JSON object.")
    return request


def _unnamed(value: Any, name: str, where: str) -> Any:
    """Returns a value: itself, or in an object under the input's name."""
    if not isinstance(value, dict) or list(value) == ["b64"]:
        return value
    if list(value) != [name]:
        raise UserError(f"{where} is not an object with the one key {name!r}.")
    return value[name]


def _photos(values: list, admit: Admit) -> np.ndarray:
    """Returns a batch from encoded photos, each of the form {"b64": "…"}."""
    encoded = {}
    for i, value in enumerate(values):
        if not isinstance(value, dict) or not isinstance(value.get("b64"), str):
            raise UserError(f'instance {i} is not of the form {{"b64": "…"}}.')
        try:
            # Padding and line breaks are optional, as in TensorFlow Serving.
            encoded[f"instance {i}"] = base64.b64decode(value["b64"] + "==")
        except ValueError as error:
            raise UserError(f"instance {i} is not base64: {error}.") from error
    return read_photos(encoded, admit)


def read_photos(encoded: dict[str, bytes], admit: Admit) -> np.ndarray:
    """Returns a batch. Calls `admit` with the pixels of all photos before it unpacks each one."""
    photos = {name: opened(content, name) for name, content in encoded.items()}
    pixels = sum(photo.width * photo.height for photo in photos.values())
    batch = []
    for name, photo in photos.items():
        admit(pixels)
        batch.append(unpacked(photo, name))
    return np.stack(batch)


def _pixels(values: list, dtype: type) -> np.ndarray:
    """Returns a batch from nested lists of whole numbers from 0 to 255, or of finite numbers."""
    # The array has objects first, because NumPy would turn text, null and true into numbers.
    array = np.array(values, dtype=object)
    if array.shape != (len(values), SIDE, SIDE, 3):
        raise UserError(
            f"The request has the shape {list(array.shape)}. Send each image as {SIDE} rows of "
            f"{SIDE} pixels of 3 numbers."
        )
    is_whole = dtype == np.uint8
    kinds, limits = ({int}, np.iinfo(np.uint8)) if is_whole else ({int, float}, np.finfo(dtype))
    is_number = set(map(type, array.flat)) <= kinds
    if not is_number or array.min() < float(limits.min) or array.max() > float(limits.max):
        raise UserError(
            "A pixel is not a whole number from 0 to 255. For other numbers, use the signature "
            "serving_float."
            if is_whole
            else "A pixel is not a number, or is too large for a float32."
        )
    return array.astype(dtype)


def _plain(array: np.ndarray) -> list:
    """Returns a list for JSON. Each float32 has only the digits that distinguish it from others."""
    if array.dtype == np.float32:
        array = array.astype(str).astype(np.float64)
    return array.tolist()
