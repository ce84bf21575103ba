"""Exports a network as a SavedModel or for LiteRT.

python -m cifar10_resnet export --ckpt_path=runs/resnet20 --export_dir=savedmodels/resnet20
"""

from absl import flags

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.cli.guard import exits_with_a_sentence
from cifar10_resnet.device import start_tensorflow

FLAGS = flags.FLAGS

flags.DEFINE_string("ckpt_path", None, "A checkpoint's prefix, or a folder: its newest checkpoint.")
flags.DEFINE_alias("model_dir", "ckpt_path")
flags.DEFINE_string("export_dir", None, "New folder to write; it appears whole or not at all.")
flags.DEFINE_enum(
    "format", "saved_model", ["saved_model", "tflite"], "A SavedModel, or a model for LiteRT."
)
flags.DEFINE_enum(
    "data_format",
    "channels_last",
    ["channels_first", "channels_last"],
    "Layout inside the network; channels_last runs everywhere, channels_first is for GPUs.",
)
flags.DEFINE_enum("dtype", "fp32", ["fp32", "bf16", "fp16"], "What the network computes in.")
flags.mark_flags_as_required(["ckpt_path", "export_dir"])

FLAG_GROUPS = {
    "What to export, and where to": ("ckpt_path", "export_dir"),
    "How": ("format", "data_format", "dtype"),
}


@flags.multi_flags_validator(
    ["format", "data_format", "dtype"], "--format=tflite is channels_last and fp32 alone"
)
def _lite_is_one(values: dict[str, object]) -> bool:
    return values["format"] != "tflite" or (
        values["data_format"] == "channels_last" and values["dtype"] == "fp32"
    )


@exits_with_a_sentence
def main(argv: list[str]) -> int:
    storage.refuse_patterns(FLAGS.export_dir)
    storage.refuse_unwritable_folder(FLAGS.export_dir)

    start_tensorflow("cpu")  # whatever the export is for, nothing large is computed here
    from cifar10_resnet import checkpoints
    from cifar10_resnet.serving import export

    prefix = checkpoints.find(FLAGS.ckpt_path)
    if FLAGS.format == "tflite":
        export.export_tflite(prefix, FLAGS.export_dir)
    else:
        export.export_saved_model(prefix, FLAGS.export_dir, FLAGS.data_format, FLAGS.dtype)
    return 0


if __name__ == "__main__":
    app.run(main, FLAG_GROUPS)
