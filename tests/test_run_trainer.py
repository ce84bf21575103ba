"""The trainer as its users run it: training, stopping, resuming, transfer."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import termios

import numpy as np
import pytest
from conftest import (
    assert_same_checkpoint,
    skip_without_channels_first,
    values_in,
    write_photos,
)
from programs import SMALL, error_of, run, run_code, start, table_in, wait_for, without_tensorflow

from cifar10_resnet import checkpoints
from cifar10_resnet.training import run_folder


def test_the_end_of_a_run_says_how_to_evaluate_it_and_quiet_says_nothing_else(data, tmp_path):
    folder = tmp_path / "a user's run"
    command = (
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={folder}", *SMALL),
        *("--num_iterations=40", "--holdout=150", "--epochs_between_evals=1"),
    )
    shown = run(*command, "--max_train_steps=20").stdout
    lines, table = shown[: shown.index("resnet8, step 20 of 40")], table_in(shown)
    assert lines.count("evaluated on holdout") == 2  # after 16 and 20 steps
    best = max(map(float, re.findall(r"evaluated on holdout: .* accuracy (\S+)%", lines)))
    assert table["best accuracy"].startswith(f"{best:.2f}% on holdout images, step ")
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
    assert float(table_in(quiet.stdout)["best accuracy"].split("%")[0]) >= best


def test_no_plot_is_drawn_and_nothing_waits_for_it_before_the_first_evaluation(data, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise SystemExit('matplotlib was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run(
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path / 'run'}", *SMALL),
        "--num_iterations=6",
        env=environment,
    )


def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_run(data, tmp_path, uninterrupted):
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
    assert re.search(r"Resuming from \S+model\.ckpt-(20|40) at step (20|40)", again.stdout)
    assert_same_checkpoint(uninterrupted / "model.ckpt-60", tmp_path / "model.ckpt-60")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_says_where_and_resumes_from_there(
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
    assert f"Resuming from {saved[1]}" in again.stdout
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
        ("--use_synthetic_data", "--use_synthetic_data=True does not", "dataset=cifar10"),
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
    assert "does not exist" in error_of(*command, cwd=tmp_path)
    assert "only 400 training images" in error_of(*command, f"--path={data}", "--holdout=400")
    assert "--fine_tune needs a pretrained network" in error_of(
        *command, f"--path={data}", "--fine_tune"
    )
    assert "--eval_only" in error_of(*command, f"--path={data}", "--eval_only")
    assert (uninterrupted / "model.ckpt-60.index").exists()


def test_a_user_who_stops_a_run_begun_with_clean_is_advised_to_resume_without_it(data, tmp_path):
    process = start(
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL, "--clean")
    )
    wait_for(process, "step 5/")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=240)
    stopped = "by Ctrl-C (run the same command without --clean to resume)"
    assert table_in(out)["stopped"] == stopped


def test_a_network_without_its_training_is_refused_as_a_run_to_go_on_with(
    data, uninterrupted, tmp_path
):
    code = "import sys; from cifar10_resnet.checkpoints import read, save_network; "
    code += "save_network(read(sys.argv[1]), sys.argv[2])"
    run_code(code, uninterrupted / "model.ckpt-60", tmp_path)
    error = error_of("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}")
    assert f"--pretrained_model_checkpoint_path={tmp_path}" in error
    scored = run("run_evaluator.py", f"--path={data}", f"--ckpt_path={tmp_path}").stdout
    assert "resnet8, step 60" in scored


def test_steps_to_profile_that_do_not_come_are_reported(data, tmp_path):
    command = ("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL)
    command += ("--num_iterations=4", "--profile_steps=2,3")
    assert "is ignored" not in run(*command, "--max_train_steps=3").stdout
    assert "--profile_steps is ignored: this start runs steps 4 to 4." in run(*command).stdout


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
    good = re.search(r"last good checkpoint is (\S+)\. ", error)
    if saved:
        assert os.path.basename(good[1].rstrip(".")) + ".index" in saved
    else:
        assert "No checkpoint was written" in error


@pytest.mark.parametrize("where", ["missing", "file", "empty", "truncated"])
def test_wrong_data_ends_with_a_one_line_error_before_training(data, tmp_path, where):
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
        "file": "it is a file",
        "empty": "contains no data set",
        "truncated": "data_batch_3.bin has 3,072 bytes",
    }
    assert expected[where] in error
    assert not list((tmp_path / "run").glob("model*"))


def test_without_data_the_trainer_says_how_to_get_it(tmp_path):
    error = error_of("run_trainer.py", cwd=tmp_path)
    assert "/cifar10_download_and_extract.py`" in error
    assert "--use_synthetic_data" in error


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


def test_eval_only_needs_only_the_test_file_and_disturbs_no_trainer(data, uninterrupted, tmp_path):
    for name in ("test_batch.bin", "batches.meta.txt"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    command = ("run_trainer.py", f"--path={tmp_path}", "--eval_only", "--quiet")
    with run_folder.lock(str(uninterrupted)):
        shown = run(*command, f"--ckpt_path={uninterrupted}").stdout
    assert shown.startswith(f"{uninterrupted}/model.ckpt-60 on test images: accuracy ")
    photos = write_photos(tmp_path / "photos", 10)  # Any data with the run's classes works.
    (photos / "class_names.txt").write_bytes((data / "batches.meta.txt").read_bytes())
    other = ("run_trainer.py", f"--path={photos}", "--eval_only", "--quiet")
    assert "on test images" in run(*other, f"--ckpt_path={uninterrupted}").stdout
    assert "typo does not exist" in error_of(*command, f"--ckpt_path={tmp_path / 'typo'}")
    assert not (tmp_path / "typo").exists()


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


def test_what_cannot_be_transferred_ends_with_a_one_line_error(data, uninterrupted, tmp_path):
    pretrained = f"--pretrained_model_checkpoint_path={uninterrupted}"
    command = ("run_trainer.py", f"--path={data}", pretrained)
    error = error_of(*command, "--num_layers=14", cwd=tmp_path)
    assert "num_layers=14" in error
    assert "num_layers=8" in error
    # The folder is not the folder of a run from scratch.
    nothing = error_of(*command, "--eval_only", cwd=tmp_path)
    assert f"the default --ckpt_path=runs/{uninterrupted.name}-transfer does not exist. " in nothing
    spared = error_of(*command, f"--ckpt_path={uninterrupted}", "--clean")
    assert f"--clean would delete the pretrained checkpoint {uninterrupted}" in spared
    assert (uninterrupted / "model.ckpt-60.index").exists()


# A trainer that is interrupted as it begins to read its images.
INTERRUPTED_TRAINER = """
import os, signal
import run_trainer
from cifar10_resnet.cli import app
from cifar10_resnet.data import splits
splits.load_training = lambda *args: os.kill(os.getpid(), signal.SIGINT)
app.run(run_trainer.main, run_trainer.Settings)
"""


def test_a_trainer_interrupted_before_its_first_step_says_that_nothing_is_lost(data, tmp_path):
    flags = (f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL)
    interrupted = run_code(INTERRUPTED_TRAINER, *flags, status=130)
    assert "interrupted before any work was lost" in interrupted.stderr.splitlines()[-1]
    assert "Traceback" not in interrupted.stderr
    assert not list(tmp_path.glob("model*"))


def test_a_run_whose_terminal_is_closed_saves_and_resumes_from_there(data, tmp_path, uninterrupted):
    command = (
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL),
        *("--num_iterations=60", "--save_per_iterations=1000"),
    )
    here, terminal = pty.openpty()
    process = start(
        *command,
        **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # The system sends SIGHUP to it.
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
    assert f"Resuming from {saved} at step " in again.stdout
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
def test_a_run_whose_output_is_closed_saves_and_resumes_from_there(
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
    assert f"Resuming from {saved} at step " in again.stdout
    assert_same_checkpoint(uninterrupted / "model.ckpt-60", tmp_path / "model.ckpt-60")


def test_a_folder_with_checkpoints_of_another_program_is_left_unchanged(data, tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "ckpt-5"\n')
    (tmp_path / "ckpt-5.index").write_bytes(b"theirs")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refused = error_of("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL)
    assert "contains checkpoints of another program (ckpt-5.index). Use another folder." in refused
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert not list(tmp_path.glob("model.ckpt*"))


@pytest.mark.parametrize("place", ["gs://bucket/run", "file:///tmp/run", "ram://run"])
def test_a_folder_of_another_file_system_is_refused_at_once(data, tmp_path, place):
    command = ("run_trainer.py", f"--path={data}", f"--ckpt_path={place}", *SMALL)
    refused = error_of(*command, cwd=tmp_path, env=without_tensorflow(tmp_path))
    assert f"{place} is not a path of this machine. Use a local one." in refused
    assert {path.name for path in tmp_path.iterdir()} == {"tensorflow.py"}


def test_a_threshold_ends_a_run_with_a_log_of_what_it_trained(data, tmp_path):
    shown = run(
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *SMALL[:2]),
        *("--epochs_between_evals=1", "--stop_threshold=0.01", "--batch_size=200"),
    ).stdout
    assert "nan" not in shown
    assert table_in(shown)["training"].endswith("last 2 steps")
    assert table_in(shown)["saved as"] == f"{tmp_path}/model.ckpt-2"


def test_fine_tuning_a_run_of_all_layers_is_refused_with_the_way_to_do_it(
    data, uninterrupted, tmp_path
):
    command = ("run_trainer.py", f"--path={data}", f"--ckpt_path={uninterrupted}")
    refused = error_of(*command, "--fine_tune")
    assert "--fine_tune does not match the run in" in refused
    start = f"--pretrained_model_checkpoint_path={uninterrupted} --fine_tune"
    assert f"start a new run: {start}, with another --ckpt_path." in refused


def test_a_depth_that_imagenets_networks_have_too_is_said_to_be_another(data, tmp_path):
    flags = ("--resnet_size=50", "--max_train_steps=1", "--batch_size=2")
    shown = run("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path}", *flags).stdout
    assert "This network is for 32x32 images. ImageNet's ResNet-50 is another." in shown


@pytest.mark.parametrize("level", ["2", "3"])
def test_a_log_level_that_wants_less_of_tensorflow_gets_no_more_than_none_does(
    data, uninterrupted, level
):
    command = ("run_trainer.py", f"--path={data}", f"--ckpt_path={uninterrupted}")
    shown = run(*command, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": level})
    assert shown.stderr == ""
