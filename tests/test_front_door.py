"""Checks what people type: the flags of two known programs, and the values of each recipe.

The flags are those of TensorFlow's official ResNet and of the light tf-resnet-cifar10 scripts.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import random_images
from programs import PROJECT, error_of, run

from cifar10_resnet import checkpoints
from cifar10_resnet.device import slowness
from cifar10_resnet.training.optimizers import learning_rates

# The settings of a run in which nothing but the data is chosen. Later versions may add some.
PAPER = {
    "num_layers": "20",
    "shortcut_connections": "True",
    "bottleneck": "False",
    "resnet_version": "2",
    "num_classes": "10",
    "batch_norm_decay": "0.99",
    "batch_norm_epsilon": "0.001",
    "holdout": "0",
    "recipe": "paper",
    "num_iterations": "64000",
    "batch_size": "128",
    "optimizer": "momentum",
    "init_lr": "0.1",
    "scale_lr": "False",
    "momentum": "0.9",
    "nesterov": "False",
    "weight_decay": "0.0002",
    "label_smoothing": "0.0",
    "alternate_flips": "False",
    "cutout": "0",
    "mixup": "0.0",
    "average_weights": "0.0",
    "seed": "0",
    "fine_tune": "False",
    "dtype": "fp32",
    "loss_scale": "128.0",
    "log_per_iterations": "1",  # because --max_train_steps=1 ends it
    "save_per_iterations": "1000",
    "max_ckpts": "5",
    "epochs_between_evals": "0",
    "stop_threshold": "None",
}
ONE_CYCLE = PAPER | {
    "recipe": "one_cycle",
    "num_iterations": "16000",
    "init_lr": "0.2",
    "nesterov": "True",
    "weight_decay": "0.0005",
}
FAST = ONE_CYCLE | {
    "recipe": "fast",
    "optimizer": "muon",
    "label_smoothing": "0.1",
    "alternate_flips": "True",
    "cutout": "9",
}
BEST = FAST | {"recipe": "best", "num_iterations": "39062", "average_weights": "0.2"}
# A smaller network for the recipes that are not the default.
PLAIN8 = ("--num_layers=8", "--shortcut_connections=False")
OF_PLAIN8 = {"num_layers": "8", "shortcut_connections": "False"}
# Learning rates by steps done. The paper changes the rate after 500, 32,000 and 48,000 steps.
PAPER_RATES = {0: 0.01, 499: 0.01, 500: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01}
PAPER_RATES |= {48_000: 0.001, 63_999: 0.001}
# Up to the peak at a fifth of 16,000 steps, then down to almost nothing.
ONE_CYCLE_RATES = {0: 0.2 / 3200, 1599: 0.1, 3199: 0.2, 3200: 0.2, 9600: 0.1}
ONE_CYCLE_RATES |= {15_999: 0.2 / 12_800}
BEST_RATES = {0: 0.2 / 7812.4, 3905: 0.2 * 3906 / 7812.4, 39_061: 0.2 / 31_249.6}


def settings_in(shown: str) -> dict[str, str]:
    """Returns the settings that --verbose prints."""
    return dict(re.findall(r"^  (\w+)  +(.*)$", shown, re.M))


def assert_settings(shown: str, expected: dict[str, str]) -> None:
    """Checks these settings. The program may print others too."""
    settings = settings_in(shown)
    assert {name: settings.get(name) for name in expected} == expected


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder that holds `cifar-10-batches-bin`, as the download script leaves it."""
    folder = tmp_path_factory.mktemp("data")
    run(
        *("cifar10_download_and_extract.py", f"--data_dir={folder}", "--synthetic"),
        *("--synthetic_train_images=80", "--synthetic_test_images=20", "--seed=3"),
    )
    names = {path.name for path in (folder / "cifar-10-batches-bin").iterdir()}
    assert names >= {*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"}
    return folder


@pytest.mark.parametrize(
    ("flags", "settings", "rates"),
    [
        ((), PAPER, PAPER_RATES),
        (("--recipe=one_cycle", *PLAIN8), ONE_CYCLE | OF_PLAIN8, ONE_CYCLE_RATES),
        (("--recipe=fast", *PLAIN8), FAST | OF_PLAIN8, ONE_CYCLE_RATES),
        (("--recipe=best", *PLAIN8), BEST | OF_PLAIN8, BEST_RATES),
    ],
    ids=["paper", "one_cycle", "fast", "best"],
)
def test_a_recipe_has_its_values(write_cifar10, tmp_path, flags, settings, rates):
    data = write_cifar10(train=random_images(130))  # A default batch is not larger than the data.
    shown = run(
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *flags),
        *("--max_train_steps=1", "--verbose"),
    ).stdout
    assert_settings(shown, settings)
    assert f" lr {rates[0]:.4g}\n" in shown

    saved = checkpoints.read(str(tmp_path / "model.ckpt-1"))
    assert saved.step == 1
    found = learning_rates(saved.run.training)
    assert len(found) == int(settings["num_iterations"])
    for done, rate in rates.items():
        np.testing.assert_allclose(found[done], rate, rtol=1e-6, err_msg=f"after {done} steps")


def test_the_official_programs_flags_work(data, tmp_path):
    model, export = tmp_path / "model", tmp_path / "export"
    names = (f"--data_dir={data}", f"--model_dir={model}")
    trained = run(
        *("run_trainer.py", *names, "--resnet_size=8", "--resnet_version=1", "--train_epochs=2"),
        *("--batch_size=16", "--epochs_between_evals=1", "--stop_threshold=1"),
        *("--max_train_steps=6", "--data_format=channels_last", "--dtype=fp16"),
        *("--loss_scale=64", "--num_gpus=0", "--distribution_strategy=off"),
        *(f"--export_dir={export}", "--verbose"),
    ).stdout
    settings = {
        "num_layers": "8",
        "resnet_version": "1",
        "num_iterations": "10",  # 2 epochs of 80 images, in batches of 16
        "batch_size": "16",
        "epochs_between_evals": "1",
        "stop_threshold": "1.0",
        "max_train_steps": "6",
        "data_format": "channels_last",
        "dtype": "fp16",
        "loss_scale": "64.0",
        "ckpt_path": str(model),
    }
    assert_settings(trained, settings)
    assert f"{slowness('fp16', 'cpu')}\nStarting at step 0." in trained
    # One epoch has 5 steps, and the last step is evaluated too.
    assert re.findall(r"step (\d+)/6 evaluated on test: ", trained) == ["5", "6"]
    assert (export / "saved_model.pb").is_file()
    assert (model / "model.ckpt-6.index").is_file()

    evaluated = run("run_trainer.py", *names, "--eval_only", "--quiet").stdout
    assert f"{model}/model.ckpt-6 on test images: accuracy " in evaluated
    scores = tmp_path / "scores.json"
    scored = run(
        *("run_evaluator.py", *names, "--resnet_size=8", "--resnet_version=1"),
        *("--data_format=channels_last", "--dtype=fp16", "--batch_size=7"),
        f"--output_json={scores}",
    ).stdout
    assert "resnet8-v1, step 6" in scored
    assert scored.startswith(slowness("fp16", "cpu"))
    assert json.loads(scores.read_text())["num_images"] == 20
    # A second name counts as typed: the program compares it with the checkpoint.
    error = error_of("run_evaluator.py", *names, "--resnet_size=14")
    assert "--resnet_size=14 does not match the checkpoint" in error


def test_the_official_programs_flags_of_a_new_start_work(tmp_path):
    pretrained = PROJECT / "files/pretrained/resnet20"
    for file in pretrained.glob("model.ckpt-16000.*"):  # an older run in the same folder
        shutil.copy(file, tmp_path)
    started = run(
        *("run_trainer.py", "--use_synthetic_data", f"--model_dir={tmp_path}", "--clean"),
        *(f"--pretrained_model_checkpoint_path={pretrained}", "--fine_tune"),
        *("--max_train_steps=1", "--batch_size=8", "--verbose"),
    ).stdout
    settings = {
        "fine_tune": "True",
        "pretrained": f"{pretrained}/model.ckpt-16000",
        "dataset": "synthetic",
        "num_layers": "20",
    }
    assert_settings(started, settings)
    assert "650 of its 269,722 parameters" in started  # the final layer's 64x10 + 10
    assert {path.name for path in tmp_path.glob("*.index")} == {"model.ckpt-1.index"}


def test_the_light_scripts_flags_work(data, tmp_path):
    names = (f"--path={data}", f"--ckpt_path={tmp_path / 'run'}")
    trained = run(
        *("run_trainer.py", *names, f"--train_log_path={tmp_path / 'log'}", "--num_layers=8"),
        *(
            "--shortcut_connection=False",
            "--batch_size=16",
            "--num_iterations=6",
            "--init_lr=0.05",
            "--momentum=0.8",
        ),
        *("--weight_decay=0.001", "--batch_norm_decay=0.95", "--max_ckpts=2"),
        *("--log_per_iterations=3", "--save_per_iterations=2", "--verbose"),
    ).stdout
    settings = {
        "shortcut_connections": "False",
        "train_log_path": str(tmp_path / "log"),
        "num_layers": "8",
        "batch_size": "16",
        "num_iterations": "6",
        "init_lr": "0.05",
        "momentum": "0.8",
        "weight_decay": "0.001",
        "batch_norm_decay": "0.95",
        "max_ckpts": "2",
        "log_per_iterations": "3",
        "save_per_iterations": "2",
    }
    assert_settings(trained, settings)
    assert re.findall(r"^step (\d)/6 .*loss", trained, re.M) == ["3", "6"]
    saved = {path.name for path in (tmp_path / "run").glob("*.index")}
    assert saved == {"model.ckpt-4.index", "model.ckpt-6.index"}
    assert any((tmp_path / "log/train").iterdir())

    evaluator = ("run_evaluator.py", *names, "--num_layers=8")
    assert "plain8, step 6" in run(*evaluator, "--shortcut_connections=False").stdout
    error = error_of(*evaluator, "--shortcut_connection=True")
    assert "--shortcut_connection=True does not match" in error
