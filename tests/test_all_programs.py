"""Tasks that need several programs, as users run them."""

import os
import re
import resource

import pytest
from conftest import random_cifar100, write_cifar100
from programs import PROGRAMS, SMALL, error_of, run, run_code, without_tensorflow


def test_a_newcomers_commands_work_one_after_the_other(tmp_path):
    run("cifar10_download_and_extract.py", "--synthetic", "--synthetic_train_images=200",
        "--synthetic_test_images=50", cwd=tmp_path)  # fmt: skip
    trained = run(
        *("run_trainer.py", "--path=cifar-10-batches-bin", *SMALL, "--max_train_steps=6"),
        cwd=tmp_path,
    )
    assert "64,000 steps" in trained.stdout  # the paper's schedule
    plain = run(
        *("run_trainer.py", "--path=cifar-10-batches-bin", *SMALL, "--max_train_steps=6"),
        "--shortcut_connections=False",
        cwd=tmp_path,
    )
    assert "plain8" in plain.stdout
    scored = run(
        *("run_evaluator.py", "--path=cifar-10-batches-bin", "--num_layers=8"),
        "--ckpt_path=runs/plain8/model.ckpt-6",
        cwd=tmp_path,
    )
    assert re.search(r"accuracy +\d+\.\d\d%", scored.stdout)
    assert (tmp_path / "runs/resnet8/log/train").is_dir()
    # Only the program's own lines.
    assert (trained.stderr, scored.stderr) == ("", "")


SLOW = ("tensorflow", "numpy", "PIL", "matplotlib", "tornado", "tensorboard")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_wrong_flags_are_answered_without_importing_anything_slow(program, tmp_path):
    for library in SLOW:
        (tmp_path / f"{library}.py").write_text(f"raise SystemExit('{library} was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert "  --" in run(program, "--help", env=environment).stdout
    assert "--num_layer is not a flag." in error_of(program, "--num_layer=20", env=environment)
    if program == "run_trainer.py":
        assert "20 and 26" in error_of(program, "--num_layers=21", env=environment)
        wrong = (program, "--dataset=cifar10", f"--path={write_cifar100(tmp_path / 'data')}")
        assert "contains CIFAR-100, not CIFAR-10" in error_of(*wrong, env=environment)


WRITTEN = (
    *(("run_trainer.py", "--use_synthetic_data", flag) for flag in ("ckpt_path", "train_log_path")),
    ("run_trainer.py", "--use_synthetic_data", "export_dir"),
    *(("run_evaluator.py", "--ckpt_path=run", flag) for flag in ("output_json", "report")),
    ("run_evaluator.py", "--ckpt_path=run", "plot_dir"),
    ("export", "--ckpt_path=run", "export_dir"),
    ("import", "--image_dir=photos", "data_dir"),
    ("cifar10_download_and_extract.py", "--synthetic", "data_dir"),
    ("plot", "--run=run", "output"),
    ("draw", "--num_layers=8", "output"),
)


@pytest.mark.parametrize(("program", "other", "flag"), WRITTEN)
def test_another_file_system_is_refused_before_tensorflow_starts(program, other, flag, tmp_path):
    (tmp_path / "work").mkdir()
    environment = without_tensorflow(tmp_path)
    for place in ("gs://bucket/new.png", "ram://new.png", f"file://{tmp_path}/new.png"):
        refused = error_of(
            program, other, f"--{flag}={place}", cwd=tmp_path / "work", env=environment
        )
        assert f"{place} is not a path of this machine. Use a local one." in refused
    assert os.listdir(tmp_path / "work") == []


def test_the_names_of_both_reference_programs_are_understood(data, tmp_path):
    run(
        *("run_trainer.py", f"--data_dir={data}", f"--model_dir={tmp_path}", "--resnet_size=8"),
        *("--shortcut_connection=False", "--batch_size=16", "--max_train_steps=1"),
    )
    scored = run(
        *("run_evaluator.py", f"--data_dir={data}", f"--model_dir={tmp_path}", "--resnet_size=8"),
        "--noshortcut_connection",
    )
    assert "plain8, step 1" in scored.stdout


@pytest.mark.parametrize("size", [401, 65_537, 100_000_000])
def test_a_batch_that_the_data_cannot_fill_is_refused_before_tensorflow_computes(
    data, tmp_path, size
):
    flags = (f"--path={data}", f"--ckpt_path={tmp_path / 'run'}", f"--batch_size={size}")
    refused = error_of("run_trainer.py", *flags, preexec_fn=_with_little_memory)
    most = "there are only 400 training images" if size == 401 else "1 to 65,536"
    assert f"--batch_size={size} is invalid: " in refused
    assert most in refused
    assert not (tmp_path / "run").exists()
    scored = error_of("run_evaluator.py", f"--ckpt_path={tmp_path}", "--batch_size=10001")
    assert "--batch_size=10001 is invalid: it must be a whole number, 1 to 10,000." in scored


def _with_little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))


OUT_OF_MEMORY = """
import tensorflow as tf
from cifar10_resnet.cli.guard import exits_with_a_sentence
raise SystemExit(exits_with_a_sentence(lambda: tf.zeros([10**6, 10**7]))())
"""


def test_what_does_not_fit_into_memory_ends_with_a_one_line_error():
    error = run_code(OUT_OF_MEMORY, status=1).stderr.splitlines()[-1]
    advice = r"Stop other programs\. If there is a --batch_size, use a smaller one\."
    assert re.search(rf"error: The memory is full: OOM .*\. {advice}$", error)


def test_a_gpu_that_is_not_there_is_refused_by_name_of_what_to_install(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    for program in ("run_trainer.py", "run_evaluator.py"):
        arguments = (program, "--device=gpu", f"--ckpt_path={tmp_path}")
        assert "pip install '.[gpu]'" in error_of(*arguments, env=environment)


def test_synthetic_images_need_no_files(tmp_path):
    run(
        *("run_trainer.py", "--use_synthetic_data", *SMALL, "--max_train_steps=2"),
        cwd=tmp_path,
    )
    scored = run("run_evaluator.py", "--ckpt_path=runs/resnet8-synthetic", cwd=tmp_path)
    assert re.search(r"images +2000", scored.stdout)
    assert "crescent" in scored.stdout


@pytest.mark.parametrize("program", ["run_trainer.py", "run_evaluator.py"])
def test_a_program_interrupted_while_it_imports_ends_with_a_one_line_error(program, tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        "import os, signal; os.write(2, b'noise'); os.kill(os.getpid(), signal.SIGINT)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    interrupted = run(program, "--ckpt_path=x", status=130, env=environment)
    assert interrupted.stderr.splitlines() == [
        f"{program}: interrupted before any work was lost. Run the same command again."
    ]


def test_cifar100_is_learned_by_its_coarse_labels_too(tmp_path):
    write_cifar100(tmp_path / "cifar-100-binary", train=random_cifar100(20))
    command = ("run_trainer.py", "--dataset=cifar100", *SMALL, "--max_train_steps=2")
    assert "(CIFAR-100)" in run(*command, "--coarse_labels", cwd=tmp_path).stdout
    scored = run("run_evaluator.py", "--ckpt_path=runs/resnet8-cifar100-coarse", cwd=tmp_path)
    assert re.search(r"images +4\n", scored.stdout)
    assert "coarse 19" in scored.stdout


# Returns an environment without the packages that only some programs need.
HIDDEN = """
import sys
sys.modules.update(dict.fromkeys(["tensorboard", "matplotlib", "PIL", "tornado", "pytest"]))
"""


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """An environment that has tensorflow, numpy and absl-py, and nothing else of this project's."""
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDDEN)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "hiding")}


def test_the_three_programs_run_with_tensorflow_numpy_and_absl(bare, tmp_path):
    run(
        *("cifar10_download_and_extract.py", "--synthetic", "--synthetic_train_images=80"),
        "--synthetic_test_images=20",
        cwd=tmp_path,
        env=bare,
    )
    trained = run(
        *("run_trainer.py", *SMALL, "--max_train_steps=4", "--epochs_between_evals=1"),
        f"--export_dir={tmp_path / 'exported'}",
        cwd=tmp_path,
        env=bare,
    )
    said = "No learning curves are written: TensorBoard is not installed."
    assert trained.stdout.count(said) == 1
    assert "tensorboard --logdir" not in trained.stdout
    assert (tmp_path / "exported" / "saved_model.pb").exists()
    assert not (tmp_path / "runs" / "resnet8" / "log").exists()
    scored = run(
        *("run_evaluator.py", "--ckpt_path=runs/resnet8", "--output_json=s.json"),
        cwd=tmp_path,
        env=bare,
    )
    assert re.search(r"accuracy +\d+\.\d\d%", scored.stdout)


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (("run_evaluator.py", "--ckpt_path=x", "--report=r.html"), "matplotlib"),
        (("classify", "--ckpt_path=x", "cat.jpg"), "PIL"),
        (("import", "--image_dir=x", "--data_dir=y"), "PIL"),
        (("plot", "--run=x"), "tensorboard"),
        (("draw",), "matplotlib"),
    ],
)
def test_what_needs_another_package_says_how_to_get_it(command, package, bare, tmp_path):
    refused = error_of(*command, cwd=tmp_path, env=bare)
    assert f"{package} is not installed. Run: pip install " in refused
