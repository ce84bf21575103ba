"""Loads an exported network and calls its signatures with images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import json_format

from cifar10_resnet import storage
from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import SIDE
from cifar10_resnet.serving import graph_check
from cifar10_resnet.terminal import command

DEFAULT = "serving_default"
IMAGE = (SIDE, SIDE, 3)


def best_classes(
    probabilities: np.ndarray, names: Sequence[str], most: int
) -> list[dict[str, str | float]]:
    """Returns up to `most` classes with their probabilities, the most likely first."""
    best = np.argsort(-probabilities, kind="stable")[:most]
    return [{"name": names[i], "probability": float(probabilities[i])} for i in best]


class SavedNetwork:
    """A loaded SavedModel and its classes. Any number of threads may call it.

    With `trust`, the SavedModel may have operations that reach files and programs.
    """

    def __init__(self, folder: str, trust: bool = False):
        storage.refuse_patterns(folder)
        try:
            saved = graph_check.read(folder)
            if not trust:
                graph_check.refuse_programs(saved, folder)
            # This attribute keeps the variables alive; the signatures do not.
            self._loaded = tf.saved_model.load(folder)
        except UserError:
            raise
        except Exception as error:  # for a damaged file, the loader raises errors of any kind
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"cannot be loaded: {reason}. Export it again.", "saved_model", folder
            ) from error
        self._definitions = saved.meta_graphs[0].signature_def
        # These are the inputs of the signatures that have exactly one.
        self.inputs: dict[str, tf.TensorSpec] = {}
        for name, signature in self._loaded.signatures.items():
            specs = list(signature.structured_input_signature[1].values())
            if len(specs) == 1:
                self.inputs[name] = specs[0]
        try:
            self.class_names = [name.decode() for name in self._loaded.class_names.numpy()]
            fits = self.inputs[DEFAULT].is_compatible_with(tf.TensorSpec([1, *IMAGE], tf.uint8))
            if fits:
                probabilities = self(np.zeros([1, *IMAGE], np.uint8))["probabilities"]
                fits = probabilities.shape == (1, len(self.class_names))
        except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError) as error:
            raise UserError(
                "does not run on this machine: TensorFlow has no kernels for its data format or "
                "precision. Export it again with --data_format=channels_last and --dtype=fp32.",
                "saved_model",
                folder,
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError, tf.errors.OpError):
            fits = False
        if not fits:
            raise UserError(
                f"is another program's SavedModel. Use one that `{command('export')}` wrote.",
                "saved_model",
                folder,
            )

    def __call__(self, inputs: np.ndarray, signature: str = DEFAULT) -> dict[str, np.ndarray]:
        """Returns the outputs of a signature for a batch."""
        tensor = {self.inputs[signature].name: tf.constant(inputs)}
        outputs = self._loaded.signatures[signature](**tensor)
        answer = {name: value.numpy() for name, value in outputs.items()}
        if not all(np.isfinite(value).all() for value in answer.values()):
            raise UserError(
                "The network's output is not finite. Use another checkpoint, pixels from 0 to 255, "
                "or --dtype=fp32."
            )
        return answer

    def describe_signatures(self) -> dict[str, Any]:
        """Returns the signatures as plain values for JSON, under TensorFlow's names."""
        return {
            name: json_format.MessageToDict(
                definition,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
            for name, definition in self._definitions.items()
        }
