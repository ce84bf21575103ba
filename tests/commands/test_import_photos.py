"""The import command, and the command that it prints for what comes next."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from programs import run, run_code, start

from cifar10_resnet.data.synthetic import CLASS_NAMES, make_split


def photograph(folder: Path, count: int) -> None:
    """Writes photos of ten kinds of shapes: larger than the network's images, and not square."""
    for i, (pixels, label) in enumerate(zip(*make_split("train", count), strict=True)):
        photo = Image.new("RGB", (96, 80))
        photo.paste(Image.fromarray(pixels).resize((80, 80)), (8, 0))
        file = folder / CLASS_NAMES[label] / f"{i}.{('png', 'jpg', 'bmp')[i % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo.save(file)


def test_what_the_import_prints_trains_a_network_that_knows_the_photos(tmp_path):
    photograph(tmp_path / "photos", 250)
    made = run("import", "--image_dir=photos", "--data_dir=photos-bin", cwd=tmp_path).stdout
    (command,) = re.findall("^next: (.*)$", made, re.M)
    trained = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert trained.returncode == 0, trained.stderr
    assert "restored all of the network but the final layer" in " ".join(trained.stdout.split())
    # 200 training images: 64 epochs of them are 100 steps of 128.
    assert re.search("^100 steps of 128 images, recipe fast", trained.stdout, re.M)

    evaluated = ("--path=photos-bin", "--ckpt_path=runs/photos-bin")
    tested = run("run_evaluator.py", *evaluated, cwd=tmp_path)
    assert re.search(r"images +50\n", tested.stdout)
    assert (
        float(re.search(r" accuracy +(\d+\.\d+)%\n", tested.stdout)[1]) > 50
    )  # seeds scatter from 68 to 90
    assert all(re.search(rf"^    {name} +\d", tested.stdout, re.M) for name in CLASS_NAMES)


@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (40, {"--train_epochs=100", "--batch_norm_decay=0.9"}),
        (1000, {"--train_epochs=20", "--batch_norm_decay=0.9"}),
        # 20 epochs are 1,000 steps: long enough for the default.
        (6400, {"--train_epochs=20"}),
    ],
)
def test_few_photos_get_more_epochs_and_short_runs_a_smaller_decay(count, flags):
    code = "from cifar10_resnet.commands.import_photos import training_flags; "
    printed = run_code(code + f"print(*training_flags({count}))").stdout
    assert set(printed.split()) == flags | {"--recipe=fast"}


@pytest.mark.parametrize(
    "flag", ["--test_share=0", "--test_share=1", "--test_share=nan", "--seed=-1"]
)
def test_a_wrong_flag_is_a_usage_error_that_names_it(flag, tmp_path):
    refused = run("import", "--image_dir=x", f"--data_dir={tmp_path / 'bin'}", flag, status=1)
    assert flag.partition("=")[0] in refused.stderr
    assert os.listdir(tmp_path) == []


def test_an_import_whose_output_nobody_reads_ends_quietly(tmp_path):
    photograph(tmp_path / "photos", 20)
    read, write = os.pipe()
    os.close(read)
    flags = (f"--image_dir={tmp_path / 'photos'}", f"--data_dir={tmp_path / 'bin'}")
    process = start("import", *flags, stdout=write)
    os.close(write)
    assert process.communicate(timeout=60) == (None, "")
    assert process.returncode == 128 + signal.SIGPIPE
