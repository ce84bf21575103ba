"""An exported network computes what the evaluator computes, without the code of this project."""

import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import has_channels_first, random_images, skip_without_channels_first
from PIL import Image
from programs import PROJECT, SMALL, error_of, run, without_tensorflow

from cifar10_resnet import checkpoints
from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig
from cifar10_resnet.data.photos import read_photo
from cifar10_resnet.errors import UserError
from cifar10_resnet.serving import export
from cifar10_resnet.training.trainer import Trainer

NAMES = ("aeroplane", "tree", "café", "d", "e", "f", "g", "h", "i", "j")
FORMS = {
    "nhwc": ("channels_last", "fp32"),
    "nchw": ("channels_first", "fp32"),
    "nhwc-bf16": ("channels_last", "bf16"),
    "nhwc-fp16": ("channels_last", "fp16"),
}
MADE = {"nhwc": "nhwc-fp32", "nchw": "nchw-fp32", "nhwc-fp16": "nhwc-fp16"}
IMAGES = random_images(3, seed=7)[0]

# Run where this checkout is out of sight: asks every signature of every SavedModel.
STRANGER = """
import importlib.util, sys
import numpy as np, tensorflow as tf
for module in ("cifar10_resnet", "resnet_model", "cifar10_input"):
    assert importlib.util.find_spec(module) is None, module
asked, folders = np.load(sys.argv[1]), sys.argv[3:]
images, answers = asked["images"], {}
photos = [bytes(asked[f"photo{i}"]) for i in range(int(asked["photos"]))]
for folder in folders:
    network = tf.saved_model.load(folder)
    answers[f"{folder} names"] = [name.decode() for name in network.class_names.numpy()]
    for name, signature in network.signatures.items():
        for count in (1, 3):
            inputs = {
                "serving_default": {"images": images[:count]},
                "serving_float": {"images": images[:count].astype(np.float32)},
                "serving_image_bytes": {"image_bytes": tf.constant(photos[:count], tf.string)},
            }[name]
            inputs = {key: tf.constant(value) for key, value in inputs.items()}
            for output, value in signature(**inputs).items():
                answers[f"{folder} {name} {count} {output}"] = value.numpy()
np.savez(sys.argv[2], **answers)
"""


def encoded(size: tuple[int, int], mode: str = "RGB", format: str = "PNG", **options) -> bytes:
    """A photo with edges and gentle slopes in it, as photographs have."""
    y, x = np.mgrid[: size[1], : size[0]]
    planes = [x * 255 // size[0], y * 255 // size[1], 255 * ((x // 9 + y // 7) % 2)]
    file = io.BytesIO()
    Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode).save(
        file, format, **options
    )
    return file.getvalue()


PHOTOS = (encoded((32, 32)), encoded((640, 426), format="JPEG"), encoded((20, 57), "RGBA"))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    """Saves a checkpoint of a network in which all variables differ. Returns its path."""
    trainer = Trainer(RunConfig(ModelConfig(8), DataConfig(class_names=NAMES)))
    rng = np.random.default_rng(3)
    trainer.model.image_mean.assign(rng.uniform(100, 150, [32, 32, 3]))
    trainer.model.logits_bias.assign(rng.normal(size=10))
    for variable in trainer.model.variables:
        if "norm" in variable.name:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return checkpoints.save(trainer.checkpoint, str(tmp_path_factory.mktemp("run")), 1)


@pytest.fixture(scope="module")
def exported(prefix, tmp_path_factory) -> Path:
    """Returns a folder of SavedModels. `make savedmodels` wrote three of them."""
    project = tmp_path_factory.mktemp("project")
    for file in (*PROJECT.glob("*.py"), *PROJECT.glob("requirements*.txt"), PROJECT / "Makefile"):
        shutil.copy(file, project)
    shutil.copytree(PROJECT / "cifar10_resnet", project / "cifar10_resnet")
    (project / "files" / "pretrained").mkdir(parents=True)
    (project / ".venv").mkdir()
    (project / ".venv" / "ready").touch()
    make = ("make", "savedmodels", f"RUN={sys.executable}")
    nothing = subprocess.run(make, cwd=project, capture_output=True, text=True)
    assert nothing.returncode != 0
    assert "There is no trained network in files/pretrained" in nothing.stderr
    shutil.copytree(os.path.dirname(prefix), project / "files" / "pretrained" / "tiny")
    subprocess.run(make, cwd=project, check=True)
    again = subprocess.run(make, cwd=project, check=True, capture_output=True, text=True)
    assert " export " not in again.stdout

    folder = tmp_path_factory.mktemp("exported")
    # No CPU computes NCHW in fp16, but it is loaded here, with its signatures.
    on_a_gpu = tf.saved_model.load(str(project / "savedmodels" / "tiny-nchw-fp16"))
    assert len(on_a_gpu.signatures) == 3
    for form, made in MADE.items():
        shutil.move(project / "savedmodels" / f"tiny-{made}", folder / form)
    shutil.rmtree(project)
    export.export_saved_model(
        checkpoints.read(prefix), str(folder / "nhwc-bf16"), *FORMS["nhwc-bf16"]
    )
    return folder


@pytest.fixture(scope="module")
def forms() -> list[str]:
    """The forms that this CPU can compute."""
    return [form for form in FORMS if form != "nchw" or has_channels_first()]


@pytest.fixture(params=FORMS)
def form(request) -> str:
    """Each form; the test is skipped where this CPU cannot compute it."""
    if request.param == "nchw":
        skip_without_channels_first()
    return request.param


@pytest.fixture(scope="module")
def answers(exported, forms, tmp_path_factory) -> dict[str, np.ndarray]:
    """Returns the answers of the SavedModels in a process without this project."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    photos = {f"photo{i}": np.frombuffer(p, np.uint8) for i, p in enumerate(PHOTOS)}
    np.savez(elsewhere / "asked.npz", images=IMAGES, photos=len(PHOTOS), **photos)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, elsewhere / "asked.npz", elsewhere / "answers.npz"]
        + [exported / form for form in forms],
        cwd=elsewhere,
        env=environment,
        check=True,
    )
    with np.load(elsewhere / "answers.npz") as file:
        return {name.removeprefix(f"{exported}/"): file[name] for name in file.files}


@pytest.fixture(scope="module")
def expected(prefix, forms) -> dict[str, np.ndarray]:
    """The logits that the evaluator computes in each form."""
    logits = {}
    for form in forms:
        model = checkpoints.load(checkpoints.read(prefix), *FORMS[form])
        compute = tf.function(
            lambda images, model=model: model(
                tf.cast(images, tf.float32) - model.image_mean, training=False
            )
        )
        logits[form] = compute(tf.constant(IMAGES)).numpy()
    return logits


def test_a_saved_model_computes_the_evaluators_logits(answers, expected, form):
    assert expected[form].std() > 0.1
    for signature in ("serving_default", "serving_float"):
        for count in (1, 3):
            logits = answers[f"{form} {signature} {count} logits"]
            tolerance = 1e-5 if form in ("nhwc", "nchw") else 2e-2
            np.testing.assert_allclose(logits, expected[form][:count], tolerance, tolerance)


def test_probabilities_and_classes_follow_from_the_logits(answers, form):
    for signature in ("serving_default", "serving_float", "serving_image_bytes"):
        for count in (1, 3):
            logits, probabilities, classes = (
                answers[f"{form} {signature} {count} {name}"]
                for name in ("logits", "probabilities", "classes")
            )
            assert (logits.shape, logits.dtype) == ((count, 10), np.float32)
            assert (probabilities.shape, probabilities.dtype) == ((count, 10), np.float32)
            assert (classes.shape, classes.dtype) == ((count,), np.int64)
            powers = np.exp(logits.astype(np.float64))
            softmax = powers / powers.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(probabilities, softmax, 1e-4, 1e-6)
            np.testing.assert_array_equal(classes, logits.argmax(axis=1))


def test_a_saved_model_names_its_classes(answers, form):
    assert tuple(answers[f"{form} names"]) == NAMES


def test_photos_as_bytes_are_answered_as_the_pixels_that_they_hold(answers, forms, prefix):
    pixels = np.stack([read_photo(photo, "a photo") for photo in PHOTOS])
    classifier = export.load_classifier(checkpoints.read(prefix))
    wanted = classifier.from_pixels(tf.constant(pixels))["logits"].numpy()
    for form in {"nhwc", "nchw"}.intersection(forms):
        logits = answers[f"{form} serving_image_bytes 3 logits"]
        np.testing.assert_allclose(logits[0], wanted[0], 1e-5, 1e-5)  # 32x32 and lossless
        np.testing.assert_allclose(logits, wanted, atol=0.02 * wanted.std())


@pytest.mark.parametrize(
    ("size", "mode", "format", "options"),
    [
        *[((w, h), "RGB", f, {}) for f in ("PNG", "JPEG") for w, h in ((1, 1), (5, 9), (33, 32))],
        ((1500, 1001), "RGB", "JPEG", {"quality": 95, "subsampling": 0}),
        ((301, 200), "RGB", "JPEG", {"progressive": True}),
        ((64, 64), "L", "JPEG", {}),
        ((64, 40), "CMYK", "JPEG", {}),
        *[((50, 70), mode, "PNG", {}) for mode in ("L", "LA", "RGBA", "P", "1")],
    ],
)
def test_the_graph_reads_photos_as_photos_py_does(size, mode, format, options):
    photo = encoded(size, mode, format, **options)
    ours = export._decode(tf.constant(photo)).numpy().astype(int)
    theirs = read_photo(photo, "a photo").astype(int)
    # CMYK is turned into RGB in each library's own way
    assert np.abs(ours - theirs).max() <= (2 if mode == "CMYK" else 1)


def test_what_is_not_a_photo_is_an_error_of_the_signature(exported):
    answer = tf.saved_model.load(exported / "nhwc").signatures["serving_image_bytes"]
    for wrong in (b"", b"no photo", PHOTOS[1][:500], PHOTOS[0][:40]):
        with pytest.raises(tf.errors.InvalidArgumentError):
            answer(image_bytes=tf.constant([PHOTOS[0], wrong]))


def test_the_signatures_are_the_promised_ones(exported):
    for form in FORMS:
        signatures = tf.saved_model.load(exported / form).signatures
        assert {
            name: signature.structured_input_signature[1] for name, signature in signatures.items()
        } == {
            "serving_default": {"images": tf.TensorSpec([None, 32, 32, 3], tf.uint8, "images")},
            "serving_float": {"images": tf.TensorSpec([None, 32, 32, 3], tf.float32, "images")},
            "serving_image_bytes": {"image_bytes": tf.TensorSpec([None], tf.string, "image_bytes")},
        }
        for signature in signatures.values():
            assert signature.structured_outputs == {
                "logits": tf.TensorSpec([None, 10], tf.float32, "logits"),
                "probabilities": tf.TensorSpec([None, 10], tf.float32, "probabilities"),
                "classes": tf.TensorSpec([None], tf.int64, "classes"),
            }


def test_a_graph_for_gpus_is_written_where_no_kernel_can_run_it(prefix, tmp_path):
    folder = tmp_path / "served" / "1"
    done = run(
        *("export", f"--ckpt_path={prefix}", f"--export_dir={folder}"),
        *("--data_format=channels_first", "--dtype=fp16"),
    )
    assert done.stdout == f"Exported {prefix} to {folder}: a SavedModel, fp16, channels_first.\n"
    assert done.stderr == ""
    convolutions = [
        node.attr["T"].type
        for function in saved_functions(folder)
        for node in function.node_def
        if node.op == "Conv2D" and node.attr["data_format"].s == b"NCHW"
    ]
    assert set(convolutions) == {tf.float16.as_datatype_enum}


def saved_functions(folder: Path):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    saved = SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    return saved.meta_graphs[0].graph_def.library.function


def test_lite_models_answer_as_the_network_does(prefix, expected, tmp_path):
    done = run(
        *("export", f"--model_dir={os.path.dirname(prefix)}", "--format=tflite"),
        f"--export_dir={tmp_path / 'lite'}",
    )
    assert "model.tflite" in done.stdout
    assert sorted(os.listdir(tmp_path / "lite")) == ["labels.txt", "model.tflite"]
    assert tuple((tmp_path / "lite/labels.txt").read_text("utf-8").splitlines()) == NAMES
    with pytest.warns(UserWarning, match="deprecated"):
        interpreter = tf.lite.Interpreter(str(tmp_path / "lite/model.tflite"))
    for signature, dtype in (("serving_default", np.uint8), ("serving_float", np.float32)):
        answer = interpreter.get_signature_runner(signature)
        for count in (1, 3):
            answers = answer(images=IMAGES[:count].astype(dtype))
            logits = answers["logits"]
            np.testing.assert_allclose(logits, expected["nhwc"][:count], 1e-4, 1e-4)
            np.testing.assert_array_equal(answers["classes"], logits.argmax(axis=1))
            np.testing.assert_allclose(answers["probabilities"].sum(axis=1), 1, 1e-5)


def test_a_lite_model_that_computes_something_else_is_not_kept(prefix, tmp_path, monkeypatch):
    convert = tf.lite.TFLiteConverter.from_saved_model

    def quantise(*arguments):
        converter = convert(*arguments)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        return converter

    monkeypatch.setattr(tf.lite.TFLiteConverter, "from_saved_model", quantise)
    with pytest.raises(UserError, match=r"the logits differ .* and 1e-04 is allowed"):
        export.export_tflite(checkpoints.read(prefix), str(tmp_path / "lite"))
    assert not os.listdir(tmp_path)


def test_a_lite_model_of_what_is_not_numbers_is_not_kept(tmp_path):
    trainer = Trainer(RunConfig(ModelConfig(8)))
    trainer.model.logits_bias.assign([np.nan] * 10)
    prefix = checkpoints.save(trainer.checkpoint, str(tmp_path / "run"), 1)
    with pytest.raises(UserError, match="output is not finite"):
        export.export_tflite(checkpoints.read(prefix), str(tmp_path / "lite"))
    assert os.listdir(tmp_path) == ["run"]


def test_an_export_that_does_not_fit_leaves_nothing(prefix, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # as many bytes as a file may have; the variables need three times as many
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*File too large"):
            export.export_saved_model(checkpoints.read(prefix), str(tmp_path / "new"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_wrong_flags_and_folders_are_errors_before_tensorflow_is_imported(prefix, tmp_path):
    environment = without_tensorflow(tmp_path)
    command = ("export", f"--ckpt_path={prefix}")
    assert "--export_dir" in run(*command, status=1, env=environment).stderr
    assert "--data_format" in run("export", "--help").stdout
    for other in ("--dtype=bf16", "--data_format=channels_first"):
        lite = run(*command, "--export_dir=x", "--format=tflite", other, status=1, env=environment)
        assert "channels_last and fp32" in lite.stderr
    assert "not empty" in error_of(*command, f"--export_dir={tmp_path}", env=environment)
    pattern = f"--export_dir={tmp_path / 'new[1]'}"
    assert "TensorFlow cannot use paths with" in error_of(*command, pattern, env=environment)

    trainer = ("run_trainer.py", f"--ckpt_path={tmp_path / 'run'}")
    assert "TensorFlow cannot use paths with" in error_of(*trainer, pattern, env=environment)
    for folder, reason in ((tmp_path, "it contains"), (tmp_path / "tensorflow.py", "directory")):
        assert reason in error_of(*trainer, f"--export_dir={folder}", env=environment)
    both = run(*trainer, f"--export_dir={tmp_path}", "--eval_only", status=1, env=environment)
    assert "the export command" in both.stderr
    assert os.listdir(tmp_path) == ["tensorflow.py"]


def test_the_trainer_exports_its_last_checkpoint(write_cifar10, tmp_path):
    path = write_cifar10()
    folder = tmp_path / "exported" / "1"
    command = (
        *("run_trainer.py", f"--path={path}", f"--ckpt_path={tmp_path / 'run'}", *SMALL),
        *(f"--export_dir={folder}", "--dtype=bf16", "--max_train_steps=3"),
    )
    assert f"Exported {tmp_path}/run/model.ckpt-3 to {folder}" in run(*command).stdout
    network = tf.saved_model.load(folder)
    model = checkpoints.load(checkpoints.read(str(tmp_path / "run" / "model.ckpt-3")), dtype="bf16")
    np.testing.assert_allclose(
        network.signatures["serving_default"](images=tf.constant(IMAGES))["logits"],
        model(tf.constant(IMAGES, tf.float32) - model.image_mean),
        *(2e-2, 2e-2),
    )
    assert "not empty" in error_of(*command)
