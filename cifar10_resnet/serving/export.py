"""Exports a checkpoint to files that do not need this code: a SavedModel, or a LiteRT model.

Writing a SavedModel does not run the network. So a machine without a GPU can write one for a GPU.
"""

import os
import shutil
import warnings
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from cifar10_resnet import storage
from cifar10_resnet.checkpoints import SavedRun, load
from cifar10_resnet.errors import UserError, unwritable
from cifar10_resnet.serving.saved_network import SavedNetwork
from resnet_model import IMAGE_SHAPE, ResNet

Answers = dict[str, tf.Tensor]

# The SavedModel's signatures take uint8 pixels, float32 pixels and encoded photos.
PIXELS, FLOATS, PHOTOS = "serving_default", "serving_float", "serving_image_bytes"
BATCH_SIZE = 500
TFLITE_FILE, NAMES_FILE = "model.tflite", "labels.txt"
# LiteRT's logits may differ from TensorFlow's by this share of the largest logit.
TFLITE_TOLERANCE = 1e-4


class Classifier(tf.Module):
    """A network with its class names, which takes pixels or encoded photos."""

    def __init__(self, model: ResNet, class_names: Sequence[str]):
        super().__init__()
        self.model = model
        with tf.device("cpu"):
            self.class_names = tf.Variable(list(class_names), trainable=False)

    def classify(self, images: np.ndarray) -> list[tuple[str, float]]:
        """Returns the most likely class of each uint8 image [N, 32, 32, 3], and its confidence."""
        names = [name.decode() for name in self.class_names.numpy()]
        found = []
        for start in range(0, len(images), BATCH_SIZE):
            shares = self.from_pixels(images[start : start + BATCH_SIZE])["probabilities"].numpy()
            found += [(names[share.argmax()], float(share.max())) for share in shares]
        return found

    def from_floats(self, images: tf.Tensor) -> Answers:
        """Returns the answers for float32 images [N, 32, 32, 3] from 0 to 255."""
        logits = self.model.logits_of_raw(images)
        return {
            "logits": logits,
            "probabilities": tf.nn.softmax(logits),
            "classes": tf.argmax(logits, axis=1),
        }

    def from_pixels(self, images: tf.Tensor) -> Answers:
        """Returns the answers for uint8 images [N, 32, 32, 3]."""
        return self.from_floats(tf.cast(images, tf.float32))

    def from_photos(self, image_bytes: tf.Tensor) -> Answers:
        """Returns the answers for encoded JPEG and PNG photos of any size, strings [N]."""
        pixels = tf.TensorSpec(IMAGE_SHAPE, tf.uint8)
        return self.from_pixels(tf.map_fn(_decode, image_bytes, fn_output_signature=pixels))


def _decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a photo in a graph as `photos.read_photo` does, except that it ignores EXIF."""
    # This decodes PNG too. The default method is faster but, in a JPEG, up to ten levels off.
    image = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")
    height, width = tf.unstack(tf.shape(image)[:2])
    side = tf.minimum(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    resized = tf.image.resize(square, IMAGE_SHAPE[:2], antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)


def load_classifier(
    saved: SavedRun, data_format: str = "channels_last", dtype: str = "fp32"
) -> Classifier:
    """Returns the network of a checkpoint, ready to export."""
    return Classifier(load(saved, data_format, dtype), saved.run.data.class_names)


def export_saved_model(
    saved: SavedRun, export_dir: str, data_format: str = "channels_last", dtype: str = "fp32"
) -> None:
    """Writes the network of a checkpoint as a SavedModel, the new folder `export_dir`."""
    classifier = load_classifier(saved, data_format, dtype)
    with storage.new_folder(export_dir) as folder:
        _save(classifier, folder, (PIXELS, FLOATS, PHOTOS))
    print(f"Exported {saved.prefix} to {export_dir}: a SavedModel, {dtype}, {data_format}.")


def export_tflite(saved: SavedRun, export_dir: str) -> None:
    """Writes a LiteRT model to the new folder `export_dir`. Refuses one with different logits."""
    classifier = load_classifier(saved)
    with storage.new_folder(export_dir) as folder:
        # The converter reads a SavedModel. In this folder, it never outlives a killed command.
        saved_model, signatures = os.path.join(folder, "saved_model"), (PIXELS, FLOATS)
        _save(classifier, saved_model, signatures)
        lite = tf.lite.TFLiteConverter.from_saved_model(saved_model, signatures).convert()
        difference = _difference(lite, saved_model)
        if not difference <= TFLITE_TOLERANCE:
            raise UserError(
                f"{saved.prefix} cannot be exported for LiteRT: the logits differ from the "
                f"SavedModel's by {difference:.1e} of the largest, and {TFLITE_TOLERANCE:.0e} is "
                "allowed. Use --format=saved_model."
            )
        shutil.rmtree(saved_model)
        with open(os.path.join(folder, TFLITE_FILE), "wb") as file:
            file.write(lite)
        with open(os.path.join(folder, NAMES_FILE), "wb") as file:
            file.writelines(name + b"\n" for name in classifier.class_names.numpy())
    print(
        f"Exported {saved.prefix} to {export_dir}: {NAMES_FILE}, and {TFLITE_FILE}, whose logits "
        f"differ from the SavedModel's by {difference:.1e} of the largest."
    )


def _save(classifier: Classifier, folder: str, signatures: Sequence[str]) -> None:
    floats = tf.TensorSpec([None, *IMAGE_SHAPE], tf.float32, "images")
    pixels = tf.TensorSpec([None, *IMAGE_SHAPE], tf.uint8, "images")
    photos = tf.TensorSpec([None], tf.string, "image_bytes")
    functions = {
        FLOATS: (classifier.from_floats, floats),
        PIXELS: (classifier.from_pixels, pixels),
        PHOTOS: (classifier.from_photos, photos),
    }
    traced = {}
    for name in signatures:
        function, takes = functions[name]
        traced[name] = tf.function(function, autograph=False).get_concrete_function(takes)
    try:
        tf.saved_model.save(classifier, folder, traced)
    except tf.errors.OpError as error:
        raise unwritable(folder, error) from error


def _difference(lite: bytes, saved_model: str) -> float:
    """Returns the difference of LiteRT's and a SavedModel's logits, as a share of the largest."""
    images = np.random.default_rng(0).integers(0, 256, (32, *IMAGE_SHAPE), np.uint8)
    expected = SavedNetwork(saved_model)(images, PIXELS)["logits"]
    with warnings.catch_warnings():
        # The interpreter warns that it moves to a separate package.
        warnings.simplefilter("ignore", UserWarning)
        interpreter = tf.lite.Interpreter(model_content=lite)
    differences = [
        interpreter.get_signature_runner(signature)(images=values)["logits"] - expected
        for signature, values in ((PIXELS, images), (FLOATS, images.astype(np.float32)))
    ]
    return float(np.abs(differences).max() / np.abs(expected).max())
