"""The commands themselves, run as their users run them: processes, files, exit statuses."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import termios
from pathlib import Path

import numpy as np
import pytest
from conftest import skip_without_channels_first, values_in, write_cifar100
from PIL import Image
from programs import SMALL, error_of, run, run_code, start, wait_for, without_tensorflow

from cifar10_resnet import checkpoints


def assert_same_checkpoint(one: str | Path, other: str | Path) -> None:
    ours, theirs = values_in(one), values_in(other)
    assert ours.keys() == theirs.keys()
    assert any("momentum" in name for name in ours)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    run(
        *("cifar10_download_and_extract.py", "--synthetic", f"--data_dir={folder}"),
        *("--synthetic_train_images=400", "--synthetic_test_images=130"),
    )
    return folder / "cifar-10-batches-bin"


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    """A whole run of 60 steps, for others to be compared with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={folder}", *SMALL),
        *("--num_iterations=60", "--save_per_iterations=20", "--max_ckpts=-1"),
    )
    return folder


def test_a_newcomers_commands_work_one_after_the_other(tmp_path):
    run("cifar10_download_and_extract.py", "--synthetic", "--synthetic_train_images=200",
        "--synthetic_test_images=50", cwd=tmp_path)  # fmt: skip
    trained = run(
        *("run_trainer.py", "--path=cifar-10-batches-bin", *SMALL, "--max_train_steps=6"),
        cwd=tmp_path,
    )
    assert "64000 steps" in trained.stdout  # the paper's schedule
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
    assert re.search(r"accuracy +0\.\d{4}", scored.stdout)
    assert (tmp_path / "runs/resnet8/log/train").is_dir()
    # nothing but the sentences that are meant for people
    assert (trained.stderr, scored.stderr) == ("", "")


@pytest.mark.parametrize("program", ["run_trainer.py", "run_evaluator.py"])
def test_help_and_wrong_flags_answer_without_importing_tensorflow(program, tmp_path):
    environment = without_tensorflow(tmp_path)
    shown = run(program, "--help", env=environment).stdout
    for flag in ("path", "ckpt_path", "num_layers", "data_format", "dtype", "device"):
        assert f"--{flag}" in shown or f"--[no]{flag}" in shown
    wrong = run(program, "--num_layer=20", "--ckpt_path=x", status=1, env=environment)
    assert "num_layers" in wrong.stderr
    if program == "run_trainer.py":
        assert "20 or 26" in error_of(program, "--num_layers=21", env=environment)
        wrong = (program, "--dataset=cifar10", f"--path={write_cifar100(tmp_path / 'data')}")
        assert "holds CIFAR-100, not CIFAR-10" in error_of(*wrong, env=environment)


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


def test_the_end_of_a_training_says_how_to_evaluate_it_and_quiet_says_nothing_else(data, tmp_path):
    folder = tmp_path / "a user's run"
    command = (
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={folder}", *SMALL),
        *("--num_iterations=40", "--holdout=150", "--epochs_between_evals=1"),
    )
    shown = run(*command, "--max_train_steps=20").stdout
    lines, table = shown[: shown.index("resnet8, step 20 of 40")], table_in(shown)
    assert lines.count("evaluated on holdout") == 2  # after 16 and 20 steps
    best = max(re.findall(r"evaluated on holdout: .* accuracy (\S+)", lines))
    assert table["best accuracy"].startswith(f"{best} on holdout images, step ")
    assert table["saved as"] == f"{folder}/model.ckpt-20"
    last = re.match(r"\S+", table["last accuracy"])[0]

    typed = subprocess.run(
        table["evaluate"] + " --quiet", shell=True, capture_output=True, text=True, timeout=240
    )
    assert typed.returncode == 0, typed.stderr
    assert typed.stdout.startswith(f"{folder}/model.ckpt-20 on holdout images: accuracy {last}, ")
    assert (typed.stdout.count("\n"), typed.stderr) == (1, "")

    quiet = run(*command, "--quiet")
    assert quiet.stdout.startswith("resnet8, step 40 of 40\n")
    assert quiet.stderr == ""
    assert float(table_in(quiet.stdout)["best accuracy"].split()[0]) >= float(best)


def table_in(shown: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\w+(?: \w+)*)  +(.*)$", shown, re.M))


def test_verbose_shows_all_settings_and_lets_tensorflow_speak(data, uninterrupted):
    shown = run("run_evaluator.py", f"--path={data}", f"--ckpt_path={uninterrupted}", "--verbose")
    assert table_in(shown.stdout)["weight_decay"] == "0.0002"
    assert "oneDNN" in shown.stderr or "optimized to use available CPU instructions" in shown.stderr


def test_no_picture_is_drawn_and_nothing_waits_for_it_before_the_first_evaluation(data, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise SystemExit('matplotlib was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run(
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path / 'run'}", *SMALL),
        "--num_iterations=6",
        env=environment,
    )


def test_a_killed_run_ends_bit_for_bit_like_one_never_interrupted(data, tmp_path, uninterrupted):
    command = (
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL),
        *("--num_iterations=60", "--save_per_iterations=20", "--max_ckpts=-1"),
    )
    process = start(*command)
    wait_for(process, "step 30/")  # past the first checkpoint, and on its way to the second
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    again = run(*command)
    assert re.search(r"Going on from \S+model\.ckpt-(20|40), step (20|40)", again.stdout)
    assert_same_checkpoint(uninterrupted / "model.ckpt-60", tmp_path / "model.ckpt-60")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_says_where_and_goes_on_from_there(
    data, tmp_path, uninterrupted, number, status
):
    command = (
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL),
        *("--num_iterations=60", "--save_per_iterations=1000"),
    )
    process = start(*command)
    wait_for(process, "step 10/")
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, out + err
    saved = re.search(r"saved as +(\S+/model\.ckpt-(\d+))", out)
    assert 10 <= int(saved[2]) < 60
    again = run(*command)
    assert f"Going on from {saved[1]}" in again.stdout
    assert_same_checkpoint(uninterrupted / "model.ckpt-60", tmp_path / "model.ckpt-60")


def test_a_finished_run_started_again_says_so_and_changes_nothing(data, uninterrupted):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in uninterrupted.glob("model*"))
    again = run("run_trainer.py", f"--path={data}", f"--ckpt_path={uninterrupted}")
    assert "finished" in again.stdout
    assert f"--ckpt_path={uninterrupted}/model.ckpt-60" in table_in(again.stdout)["evaluate"]
    assert sorted((p.name, p.stat().st_mtime_ns) for p in uninterrupted.glob("model*")) == before


@pytest.mark.parametrize(
    ("flag", "asked", "found"),
    [
        ("--num_layers=14", "num_layers=14", "num_layers=8"),
        ("--shortcut_connections=False", "shortcut_connections=False", "connections=True"),
        ("--num_iterations=70", "num_iterations=70", "num_iterations=60"),
        ("--seed=1", "seed=1", "seed=0"),
        ("--use_synthetic_data", "dataset=synthetic", "dataset=cifar10"),
    ],
)
def test_resuming_with_another_value_names_both(data, uninterrupted, flag, asked, found):
    error = error_of("run_trainer.py", f"--path={data}", f"--ckpt_path={uninterrupted}", flag)
    assert asked in error
    assert found in error


def test_what_may_change_on_resuming_does(data, tmp_path):
    skip_without_channels_first("bf16")
    command = ("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL)
    run(*command, "--num_iterations=12", "--max_train_steps=5")
    resumed = run(*command, "--data_format=channels_first", "--dtype=bf16", "--max_train_steps=9")
    assert "bf16, channels_first" in resumed.stdout
    assert "step 9/9" in resumed.stdout
    run(*command)
    assert values_in(tmp_path / "model.ckpt-12")["step/.ATTRIBUTES/VARIABLE_VALUE"] == 12


def test_clean_starts_over(data, tmp_path):
    command = ("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL)
    run(*command, "--num_iterations=4")
    (tmp_path / "notes.txt").write_text("mine")
    again = run(*command, "--num_iterations=3", "--clean")
    assert "Starting at step 0" in again.stdout
    assert {p.name for p in tmp_path.glob("*.index")} == {"model.ckpt-3.index"}
    assert len(list((tmp_path / "log/train").iterdir())) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_clean_deletes_nothing_before_the_new_run_is_known_to_be_possible(
    data, uninterrupted, tmp_path
):
    command = ("run_trainer.py", f"--ckpt_path={uninterrupted}", "--clean")
    assert "no data" in error_of(*command, cwd=tmp_path)
    assert "leaves nothing" in error_of(*command, f"--path={data}", "--holdout=400")
    assert "was trained before" in error_of(*command, f"--path={data}", "--fine_tune")
    assert "--eval_only" in error_of(*command, f"--path={data}", "--eval_only")
    assert (uninterrupted / "model.ckpt-60.index").exists()


def test_who_stops_a_run_begun_with_clean_is_told_to_go_on_without_it(data, tmp_path):
    process = start(
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL, "--clean")
    )
    wait_for(process, "step 5/")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=240)
    stopped = "by SIGINT; the same command without --clean goes on from there"
    assert table_in(out)["stopped"] == stopped


def test_a_network_without_its_training_is_refused_as_a_run_to_go_on_with(
    data, uninterrupted, tmp_path
):
    code = "import sys; from cifar10_resnet.checkpoints import save_network; "
    code += "save_network(*sys.argv[1:])"
    run_code(code, uninterrupted / "model.ckpt-60", tmp_path)
    error = error_of("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}")
    assert f"--pretrained_model_checkpoint_path={tmp_path}" in error
    scored = run("run_evaluator.py", f"--path={data}", f"--ckpt_path={tmp_path}").stdout
    assert "resnet8, step 60" in scored


def test_steps_to_profile_that_do_not_come_are_told_of(data, tmp_path):
    command = ("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL)
    command += ("--num_iterations=4", "--profile_steps=2,3")
    assert "Nothing is profiled" not in run(*command, "--max_train_steps=3").stdout
    assert "--profile_steps begins outside of 4 to 4." in run(*command).stdout


def test_a_home_folder_behind_an_equals_sign_is_found(data, uninterrupted):
    home = {**os.environ, "HOME": str(uninterrupted.parent)}
    scored = run(
        "run_evaluator.py", f"--path={data}", f"--ckpt_path=~/{uninterrupted.name}", env=home
    )
    assert f"{uninterrupted}/model.ckpt-60 (resnet8, step 60)" in scored.stdout


def test_a_second_trainer_in_the_same_folder_is_refused(data, tmp_path):
    command = ("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL)
    first = start(*command)
    try:
        wait_for(first, "step 5/")
        assert "another trainer" in error_of(*command)
    finally:
        first.kill()
        first.communicate()


def test_a_diverging_run_stops_and_leaves_its_last_good_checkpoint(data, tmp_path):
    command = (
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL),
        *("--init_lr=1e20", "--num_iterations=64000", "--save_per_iterations=1"),
    )
    error = error_of(*command)
    assert re.search(r"not finite at step \d+|no longer finite by step \d+", error)
    saved = [p.name for p in tmp_path.glob("model.ckpt-*.index")]
    for name in saved:
        values = values_in(tmp_path / name.removesuffix(".index"))
        numbers = [v for v in values.values() if getattr(v, "dtype", None) == np.float32]
        assert all(np.isfinite(v).all() for v in numbers)
    good = re.search(r"last good checkpoint is (\S+);? ", error)
    if saved:
        assert os.path.basename(good[1].rstrip(".")) + ".index" in saved
    else:
        assert "no checkpoint was written" in error


@pytest.mark.parametrize("where", ["missing", "file", "empty", "truncated"])
def test_wrong_data_ends_in_one_sentence_before_training(data, tmp_path, where):
    path = tmp_path / "cifar"
    if where == "file":
        path.write_bytes(b"")
    elif where != "missing":
        path.mkdir()
    if where == "truncated":
        for file in data.glob("*.bin"):
            (path / file.name).write_bytes(file.read_bytes())
        (path / "data_batch_3.bin").write_bytes(b"\0" * 3072)
    error = error_of("run_trainer.py", f"--path={path}", f"--ckpt_path={tmp_path / 'run'}")
    expected = {
        "missing": "cifar10_download_and_extract.py",
        "file": "is a file",
        "empty": "holds no data set",
        "truncated": "data_batch_3.bin has 3,072 bytes",
    }
    assert expected[where] in error
    assert not list((tmp_path / "run").glob("model*"))


def test_without_data_the_trainer_says_how_to_get_it(tmp_path):
    error = error_of("run_trainer.py", cwd=tmp_path)
    assert "python cifar10_download_and_extract.py" in error
    assert "--use_synthetic_data" in error


OUT_OF_MEMORY = """
import tensorflow as tf
from cifar10_resnet.errors import exits_with_a_sentence
raise SystemExit(exits_with_a_sentence(lambda: tf.zeros([10**6, 10**7]))())
"""


def test_what_does_not_fit_into_memory_ends_in_one_sentence():
    error = run_code(OUT_OF_MEMORY, status=1).stderr.splitlines()[-1]
    assert re.search(r"error: out of memory: OOM .*; a smaller --batch_size needs less\.$", error)


def test_a_gpu_that_is_not_there_is_refused_by_name_of_what_to_install(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    for program in ("run_trainer.py", "run_evaluator.py"):
        arguments = (program, "--device=gpu", f"--ckpt_path={tmp_path}")
        assert "requirements-gpu.txt" in error_of(*arguments, env=environment)


def test_the_evaluator_writes_what_it_prints(data, uninterrupted, tmp_path):
    file = tmp_path / "scores.json"
    shown = run(
        *("run_evaluator.py", f"--path={data}", f"--ckpt_path={uninterrupted}"),
        f"--output_json={file}",
    ).stdout
    scores = json.loads(file.read_text())
    assert scores["num_images"] == 130
    assert np.sum(scores["confusion_matrix"]) == 130
    assert f"{scores['accuracy']:.4f}" in shown
    assert f"{scores['loss']:.4f}" in shown
    assert scores["accuracy"] == np.trace(scores["confusion_matrix"]) / 130
    assert scores["accuracy"] <= scores["top_5_accuracy"] <= 1
    assert len(scores["per_class_accuracy"]) == 10
    assert scores["description"]["model"]["num_layers"] == 8


def test_all_checkpoints_are_scored_in_turn(data, uninterrupted, tmp_path):
    file = tmp_path / "scores.json"
    run(
        *("run_evaluator.py", f"--path={data}", f"--ckpt_path={uninterrupted}", "--split=train"),
        *("--all_checkpoints", f"--output_json={file}", "--batch_size=64"),
    )
    scores = json.loads(file.read_text())
    assert [score["step"] for score in scores] == [20, 40, 60]
    assert {score["num_images"] for score in scores} == {400}
    assert len({score["loss"] for score in scores}) == 3


def test_evaluating_needs_the_test_file_alone(data, uninterrupted, tmp_path):
    for name in ("test_batch.bin", "batches.meta.txt"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    run("run_evaluator.py", f"--path={tmp_path}", f"--ckpt_path={uninterrupted}")


@pytest.mark.parametrize(
    ("layout", "dtype"), [("channels_first", "fp32"), ("channels_last", "fp16")]
)
def test_layouts_and_precisions_score_one_checkpoint_alike(
    data, uninterrupted, tmp_path, layout, dtype
):
    if layout == "channels_first":
        skip_without_channels_first(dtype)
    losses = []
    for flags in ((), (f"--data_format={layout}", f"--dtype={dtype}")):
        file = tmp_path / "scores.json"
        run(
            *("run_evaluator.py", f"--path={data}", f"--ckpt_path={uninterrupted}"),
            *(f"--output_json={file}", *flags),
        )
        losses.append(json.loads(file.read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == "fp32" else 2e-2)


def test_what_the_evaluator_cannot_score_ends_in_one_sentence(data, uninterrupted, tmp_path):
    def refused(ckpt_path, *flags):
        return error_of("run_evaluator.py", f"--path={data}", f"--ckpt_path={ckpt_path}", *flags)

    assert "no checkpoint" in refused(tmp_path / "nowhere")
    assert "no checkpoint" in refused(tmp_path)
    assert "no checkpoint" in refused(data)
    names = refused(uninterrupted, "--num_layers=20")
    assert "num_layers=20" in names
    assert "num_layers=8" in names
    for suffix in (".index", ".sha256"):
        name = "model.ckpt-20" + suffix
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    assert "is missing" in refused(tmp_path / "model.ckpt-20")
    name = "model.ckpt-20.data-00000-of-00001"
    (tmp_path / name).write_bytes((uninterrupted / name).read_bytes()[:-1])
    assert "damaged" in refused(tmp_path)


def test_eval_only_scores_the_holdout_of_its_run_and_trains_nothing(data, tmp_path):
    command = ("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL)
    run(*command, "--holdout=100", "--num_iterations=3")
    before = sorted(os.listdir(tmp_path))
    shown = run(*command, "--eval_only").stdout
    assert sorted(os.listdir(tmp_path)) == before
    assert "on holdout images" in shown
    assert re.search(r"images +100", shown)
    scored = run(
        *("run_evaluator.py", f"--path={data}", f"--ckpt_path={tmp_path}", "--split=holdout")
    )
    assert scored.stdout == shown
    assert re.search(
        r"images +300",
        run(
            "run_evaluator.py", f"--path={data}", f"--ckpt_path={tmp_path}", "--split=train"
        ).stdout,
    )


def test_eval_only_needs_the_test_file_alone_and_disturbs_no_trainer(data, uninterrupted, tmp_path):
    for name in ("test_batch.bin", "batches.meta.txt"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    command = ("run_trainer.py", f"--path={tmp_path}", "--eval_only", "--quiet")
    with checkpoints.lock(str(uninterrupted)):
        shown = run(*command, f"--ckpt_path={uninterrupted}").stdout
    assert shown.startswith(f"{uninterrupted}/model.ckpt-60 on test images: accuracy ")
    assert "no checkpoint is at" in error_of(*command, f"--ckpt_path={tmp_path / 'typo'}")
    assert not (tmp_path / "typo").exists()


def test_generated_pictures_need_no_files(tmp_path):
    run(
        *("run_trainer.py", "--use_synthetic_data", *SMALL, "--max_train_steps=2"),
        cwd=tmp_path,
    )
    scored = run("run_evaluator.py", "--ckpt_path=runs/resnet8-synthetic", cwd=tmp_path)
    assert re.search(r"images +2000", scored.stdout)
    assert "crescent" in scored.stdout


def test_a_pretrained_network_learns_other_classes_under_a_name_of_its_own(uninterrupted, tmp_path):
    tuned = run(
        *("run_trainer.py", "--use_synthetic_data", *SMALL[1:], "--num_iterations=9"),
        *(f"--pretrained_model_checkpoint_path={uninterrupted}", "--fine_tune"),
        "--max_train_steps=4",
        cwd=tmp_path,
    )
    assert "Fine-tuning the final layer of resnet8 (650 of its " in tuned.stdout
    assert f"{uninterrupted}/model.ckpt-60: restored all of the network but" in tuned.stdout
    folder = tmp_path / f"runs/{uninterrupted.name}-fine-tune-synthetic"
    resumed = run("run_trainer.py", *SMALL, f"--ckpt_path={folder}", "--use_synthetic_data")
    assert "Fine-tuning" in resumed.stdout
    assert "step 9/9" in resumed.stdout
    before, after = values_in(uninterrupted / "model.ckpt-60"), values_in(folder / "model.ckpt-9")
    network = {name for name in before if name.startswith("model/") and "logits" not in name}
    assert len(network) > 30
    for name in network:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert b'"fine_tune": true' in after["description/.ATTRIBUTES/VARIABLE_VALUE"]


def test_what_cannot_be_transferred_ends_in_one_sentence(data, uninterrupted, tmp_path):
    pretrained = f"--pretrained_model_checkpoint_path={uninterrupted}"
    command = ("run_trainer.py", f"--path={data}", pretrained)
    error = error_of(*command, "--num_layers=14", cwd=tmp_path)
    assert "num_layers=14" in error
    assert "num_layers=8" in error
    # in a folder apart from that of a run from scratch
    nothing = error_of(*command, "--eval_only", cwd=tmp_path)
    assert f"no checkpoint in runs/{uninterrupted.name}-transfer: " in nothing
    spared = error_of(*command, f"--ckpt_path={uninterrupted}", "--clean")
    assert f"--clean would delete {uninterrupted}" in spared
    assert (uninterrupted / "model.ckpt-60.index").exists()


# A trainer that is interrupted as it begins to read its images.
INTERRUPTED_TRAINER = """
import os, signal
from absl import app
import run_trainer
from cifar10_resnet.training import trainer
trainer.load_training = lambda *args: os.kill(os.getpid(), signal.SIGINT)
app.run(run_trainer.main)
"""


def test_a_trainer_interrupted_before_its_first_step_says_that_nothing_is_lost(data, tmp_path):
    flags = (f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL)
    interrupted = run_code(INTERRUPTED_TRAINER, *flags, status=130)
    assert "interrupted; nothing is lost" in interrupted.stderr.splitlines()[-1]
    assert "Traceback" not in interrupted.stderr
    assert not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("program", ["run_trainer.py", "run_evaluator.py"])
def test_a_program_interrupted_while_it_imports_ends_in_one_sentence(program, tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        "import os, signal; os.write(2, b'noise'); os.kill(os.getpid(), signal.SIGINT)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    interrupted = run(program, "--ckpt_path=x", status=130, env=environment)
    assert interrupted.stderr.splitlines() == [
        f"{program}: interrupted; nothing is lost: start the same command again."
    ]


def test_a_run_whose_terminal_is_closed_saves_and_goes_on_from_there(data, tmp_path, uninterrupted):
    command = (
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL),
        *("--num_iterations=60", "--save_per_iterations=1000"),
    )
    here, terminal = pty.openpty()
    process = start(
        *command,
        **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # whose hanging up is told to it
    )
    os.close(terminal)
    shown = b""
    while b"step 10/" not in shown:
        shown += os.read(here, 4096)
    os.close(here)
    process.send_signal(signal.SIGHUP)  # as a shell does too, after the system
    assert process.wait(timeout=240) != 0
    saved, _ = checkpoints.newest_intact(str(tmp_path))
    again = run(*command)
    assert f"Going on from {saved}, step " in again.stdout
    assert_same_checkpoint(uninterrupted / "model.ckpt-60", tmp_path / "model.ckpt-60")


def test_a_run_under_nohup_does_not_mind_a_closed_terminal(data, tmp_path):
    command = ("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL)
    process = start(
        *(*command, "--num_iterations=60"),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_for(process, "step 10/")
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "step 60/60" in out


@pytest.mark.parametrize("interrupted", [False, True])  # `… | head`; Ctrl-C on `… | tee log`
def test_a_run_whose_output_nobody_reads_any_more_saves_and_goes_on_from_there(
    data, tmp_path, uninterrupted, interrupted
):
    command = (
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL),
        *("--num_iterations=60", "--save_per_iterations=1000"),
    )
    process = start(*command)
    wait_for(process, "step 10/")
    process.stdout.close()
    if interrupted:
        process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    assert process.wait(timeout=240) == 128 + signal.SIGPIPE
    (saved,) = re.findall(r"^Nobody reads the output any more; saved as (\S+)\.\n$", err)
    again = run(*command)
    assert f"Going on from {saved}, step " in again.stdout
    assert_same_checkpoint(uninterrupted / "model.ckpt-60", tmp_path / "model.ckpt-60")


def test_a_folder_of_ones_own_pictures_becomes_a_network_that_knows_them(tmp_path):
    rng = np.random.default_rng(0)
    colours = {"leaf": (30, 160, 40), "sea": (20, 60, 180), "sunset": (230, 120, 40)}
    for name, colour in colours.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            image = np.array(colour) + rng.integers(-20, 21, (60 + i, 80, 3))
            kind = ("png", "jpg", "bmp")[i % 3]
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"photos/{name}/{i}.{kind}")
    made = run(
        "images_to_binary.py", "--image_dir=photos", "--data_dir=photos-bin", cwd=tmp_path
    ).stdout
    command = made.splitlines()[-1].removeprefix("next: python ").split()
    run(
        *(*command, "--num_layers=8", "--recipe=one_cycle", "--num_iterations=20", "--holdout=9"),
        *("--batch_norm_decay=0.5", "--epochs_between_evals=20"),  # the batch of 128 outdoes the 48
        cwd=tmp_path,
    )
    scored = ("run_evaluator.py", "--path=photos-bin", "--ckpt_path=runs/resnet8-pictures")
    tested = run(*scored, cwd=tmp_path).stdout
    assert re.search(r"images +12\n", tested)
    assert float(re.search(r" accuracy +(\d\.\d+)\n", tested)[1]) > 0.9
    assert all(re.search(rf"^    {name} +\d", tested, re.M) for name in colours)
    assert re.search(r"images +9\n", run(*scored, "--split=holdout", cwd=tmp_path).stdout)


def test_cifar100_is_learned_by_its_coarse_labels_too(tmp_path):
    write_cifar100(tmp_path / "cifar-100-binary")
    command = ("run_trainer.py", "--dataset=cifar100", *SMALL, "--max_train_steps=2")
    assert "(cifar100)" in run(*command, "--coarse_labels", cwd=tmp_path).stdout
    scored = run("run_evaluator.py", "--ckpt_path=runs/resnet8-cifar100-coarse", cwd=tmp_path)
    assert re.search(r"images +4\n", scored.stdout)
    assert "coarse 19" in scored.stdout
