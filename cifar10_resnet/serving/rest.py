"""Answers TensorFlow Serving's REST requests for predictions.

A request has its images either in rows (`instances`) or in columns (`inputs`). The answer has the
same form: `predictions` or `outputs`.
"""

import base64
import json
import time
from typing import Any, NoReturn

import numpy as np

from cifar10_resnet.data.photos import read_photo
from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import SIDE
from cifar10_resnet.serving.saved_network import DEFAULT, SavedNetwork

MAX_INSTANCES = 256
MAX_SECONDS = 30  # to decode the photos of one request
# The JSON of MAX_INSTANCES images has fewer commas and opening brackets, even in the longest form.
# Each makes an object in memory that is several times as large as its text in the request.
MAX_MARKS = MAX_INSTANCES * (SIDE * SIDE * 3 + SIDE * SIDE + SIDE + 8)


def predict(network: SavedNetwork, body: bytes) -> dict[str, Any]:
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
    values = _rows(request["instances"], name) if rowwise else _column(request["inputs"], name)
    if not isinstance(values, list) or not values:
        raise UserError("The request must have a list of one or more images.")
    if len(values) > MAX_INSTANCES:
        raise UserError(f"The request has {len(values)} images. Send up to {MAX_INSTANCES}.")
    if dtype == "string":
        # The graph would decode any photo, no matter how much memory it takes. `read_photo` checks
        # a photo first, and gives the same pixels as everywhere in this project.
        outputs = network(_photos(values))
    else:
        outputs = network(_pixels(values, dtype.as_numpy_dtype), signature)
    columns = {key: _plain(value) for key, value in outputs.items()}
    if not rowwise:
        return {"outputs": columns}
    return {
        "predictions": [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    }


def _parse(body: bytes) -> dict[str, Any]:
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_MARKS:
        raise UserError(f"The request has too many values. Send up to {MAX_INSTANCES} images.")
    try:
        request = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"The request is not JSON: {error}.") from error
    if not isinstance(request, dict):
        raise UserError("The request is not a JSON object.")
    return request


def _refuse_constant(constant: str) -> NoReturn:
    raise UserError(f"{constant} is not a pixel value. Send finite numbers.")


def _rows(instances: Any, name: str) -> Any:
    """Returns the value of each instance: itself, or in an object under the input's name."""
    if isinstance(instances, list) and any(_is_named(instance) for instance in instances):
        for i, instance in enumerate(instances):
            if not _is_named(instance) or list(instance) != [name]:
                raise UserError(f"instance {i} is not an object with the one key {name!r}.")
        return [instance[name] for instance in instances]
    return instances


def _column(inputs: Any, name: str) -> Any:
    """Returns the input's values: a list, or in an object under the input's name."""
    if not _is_named(inputs):
        return inputs
    if name not in inputs:
        raise UserError(f"'inputs' is an object without the key {name!r}.")
    return inputs[name]


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and list(value) != ["b64"]


def _photos(values: list) -> np.ndarray:
    """Returns a batch from encoded photos, each of the form {"b64": "…"}."""
    photos = []
    end = time.monotonic() + MAX_SECONDS
    for i, value in enumerate(values):
        if time.monotonic() > end:
            raise UserError(
                f"Reading the first {i} photos took {MAX_SECONDS} seconds. Send fewer or smaller "
                "ones."
            )
        if not isinstance(value, dict) or not isinstance(value.get("b64"), str):
            raise UserError(f'instance {i} is not of the form {{"b64": "…"}}.')
        try:
            # Padding and line breaks are optional, as in TensorFlow Serving.
            encoded = base64.b64decode(value["b64"] + "==")
        except ValueError as error:
            raise UserError(f"instance {i} is not base64: {error}.") from error
        photos.append(read_photo(encoded, f"instance {i}"))
    return np.stack(photos)


def _pixels(values: list, dtype: type) -> np.ndarray:
    """Returns a batch from nested lists of whole numbers from 0 to 255, or of finite numbers."""
    # The array has objects first, because NumPy would turn text, null and true into numbers.
    array = np.array(values, dtype=object)
    if array.shape != (len(values), SIDE, SIDE, 3):
        raise UserError(
            f"The request has the shape {list(array.shape)}. Send each image as {SIDE} rows of "
            f"{SIDE} pixels of 3 numbers."
        )
    kinds = set(map(type, array.flat))
    if dtype == np.uint8:
        if kinds != {int} or array.min() < 0 or array.max() > 255:
            raise UserError(
                "A pixel is not a whole number from 0 to 255. For other numbers, use the signature "
                "serving_float."
            )
    elif not kinds <= {int, float}:
        raise UserError("A pixel is not a number.")
    try:
        with np.errstate(over="ignore"):
            pixels = array.astype(dtype)
    except OverflowError:
        pixels = np.array(np.inf)
    if not np.isfinite(pixels).all():
        raise UserError("A pixel is too large for a float32.")
    return pixels


def _plain(array: np.ndarray) -> list:
    """Returns a list for JSON. Each float32 has only the digits that distinguish it from others."""
    if array.dtype == np.float32:
        array = array.astype(str).astype(np.float64)
    return array.tolist()
