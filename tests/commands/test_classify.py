"""The classifier's command: it prints what the network computes, and says what it cannot read."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from programs import run, without_tensorflow

from cifar10_resnet import checkpoints
from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig
from cifar10_resnet.data.photos import read_photo_file
from cifar10_resnet.device import resolve_data_format
from cifar10_resnet.errors import UserError
from cifar10_resnet.serving import export
from cifar10_resnet.training.trainer import Trainer

NAMES = ("tree", "house", "river")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    run = RunConfig(ModelConfig(8, num_classes=3), DataConfig(class_names=NAMES))
    trainer = Trainer(run)
    # The classes get similar probabilities, so the most likely one depends on the photo.
    trainer.model.logits_kernel.assign(trainer.model.logits_kernel / 100)
    return checkpoints.save(trainer.checkpoint, str(tmp_path_factory.mktemp("run")), 1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Writes five photos, two of them in a folder, and other files. Returns their folder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    rng = np.random.default_rng(5)
    for name in ("big.jpg", "small.png", "old.bmp", "more/Wide.JPEG", "more/naïve.png"):
        colours = rng.integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(colours).resize((int(rng.integers(20, 90)), 40)).save(folder / name)
    (folder / "more" / "notes.txt").write_text("not a photo, and not said to be one")
    (folder / "more" / "._Wide.JPEG").write_text("no photo, and hidden")
    (folder / "text.png").write_text("no photo")
    (folder / "cut.jpg").write_bytes((folder / "big.jpg").read_bytes()[:400])
    (folder / "empty").mkdir()
    return folder


def answers_for(prefix: str, files: list[Path]) -> list[list[tuple[str, float]]]:
    """Returns the classes of each file with their probabilities, the most likely class first."""
    model = checkpoints.load(checkpoints.read(prefix))
    images = tf.constant(np.stack([read_photo_file(str(file)) for file in files]), tf.float32)
    shares = tf.nn.softmax(model(images - model.image_mean)).numpy()
    return [
        sorted(zip(NAMES, map(float, row), strict=True), key=lambda guess: -guess[1])
        for row in shares
    ]


def test_good_photos_are_classified_and_bad_ones_are_reported(prefix, photos):
    done = run(
        *("classify", "big.jpg", f"--ckpt_path={prefix}", "text.png", "more", "--top=2"),
        *("nowhere.png", "old.bmp", "empty", "cut.jpg"),
        status=1,
        cwd=photos,
    )
    rows = [line.rstrip() for line in done.stdout.splitlines()]
    files = ["big.jpg", "more/Wide.JPEG", "more/naïve.png", "old.bmp"]
    expected = answers_for(prefix, [photos / file for file in files])
    assert len(rows) == 2 * len(files)
    for i, (file, guesses) in enumerate(zip(files, expected, strict=True)):
        for row, start, (name, share) in zip(rows[2 * i :], (file, ""), guesses, strict=False):
            assert row == f"{start:<14}  {name:<5}  {share:>6.2%}"
    problems = done.stderr.splitlines()
    assert all(line.startswith("cifar10_resnet classify: error: ") for line in problems)
    for problem, said in zip(
        problems,
        (
            "text.png is not a JPEG, PNG or BMP photo",
            "nowhere.png cannot be read: No such file or directory",
            "empty contains no photo",
            "cut.jpg is a damaged photo",
        ),
        strict=True,
    ):
        assert said in problem


def test_a_saved_model_answers_in_json_as_the_checkpoint_does(prefix, photos, tmp_path):
    export.export_saved_model(checkpoints.read(prefix), str(tmp_path / "exported"))
    files = [photos / "small.png", photos / "big.jpg"]
    done = run(
        *("classify", "--json", f"--saved_model={tmp_path / 'exported'}", *files),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stderr == ""
    answers = json.loads(done.stdout)
    expected = answers_for(prefix, files)
    assert [answer["picture"] for answer in answers] == [str(file) for file in files]
    for answer, guesses in zip(answers, expected, strict=True):
        assert [guess["name"] for guess in answer["classes"]] == [name for name, _ in guesses]
        shares = [guess["probability"] for guess in answer["classes"]]
        np.testing.assert_allclose(shares, [share for _, share in guesses], 1e-4)


def test_the_network_is_looked_for_before_any_photo_is_read(photos):
    done = run("classify", "text.png", "--ckpt_path=typo", status=1, cwd=photos)
    assert "--ckpt_path=typo does not exist" in done.stderr
    assert "text.png" not in done.stderr


def test_a_photos_name_cannot_command_the_terminal(prefix, photos, tmp_path):
    shutil.copy(photos / "big.jpg", tmp_path / "a\x1b]0;b\x07\nc.jpg")
    shown = run("classify", f"--ckpt_path={prefix}", "--top=1", tmp_path).stdout
    assert shown.startswith(f"{tmp_path}/a?]0;b??c.jpg  ")
    assert shown.count("\n") == 1


def test_a_data_format_without_kernels_here_is_a_one_line_error(prefix, photos, tmp_path):
    with contextlib.suppress(UserError):
        resolve_data_format("channels_first", "fp16", "cpu")
        pytest.skip("this CPU has them")
    export.export_saved_model(
        checkpoints.read(prefix), str(tmp_path / "x"), "channels_first", "fp16"
    )
    done = run(
        *("classify", f"--saved_model={tmp_path / 'x'}", photos / "big.jpg"),
        status=1,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    assert "no kernels for its data format or precision" in done.stderr.splitlines()[-1]


def test_errors_that_need_no_network_come_without_importing_tensorflow(prefix, photos, tmp_path):
    environment = without_tensorflow(tmp_path)

    def stopped(*arguments: object) -> str:
        done = run("classify", *arguments, status=1, env=environment, cwd=photos)
        return done.stdout + done.stderr

    checkpoint = f"--ckpt_path={prefix}"
    shown = run("classify", "--help", env=environment, cwd=photos).stdout
    assert "--saved_model" in shown
    assert "One network is needed. Use either --ckpt_path or --saved_model." in stopped("big.jpg")
    assert "One network is needed." in stopped("big.jpg", checkpoint, "--saved_model=x")
    assert "--top" in stopped("big.jpg", checkpoint, "--top=0")
    assert "No photos given" in stopped(checkpoint)
    assert "--saved_model=more contains no SavedModel." in stopped("big.jpg", "--saved_model=more")
