"""Names a run's folder, locks it against a second trainer, and cleans it for a new run.

Importing this module does not import TensorFlow, because folders are settled before that starts.
"""

import contextlib
import dataclasses
import glob
import os
from collections.abc import Iterator
from typing import Any

from cifar10_resnet import storage
from cifar10_resnet.config import ModelConfig, with_given
from cifar10_resnet.errors import UserError, unwritable
from cifar10_resnet.options import Options


def settle(options: Options, given: dict[str, Any]) -> Options:
    """Returns the options with the folders of the run. Refuses paths that TensorFlow cannot use."""
    default = _default_folder(options, given)  # Always called, because it refuses a wrong depth.
    ckpt_path = options.ckpt_path or default
    log_path = options.train_log_path or os.path.join(ckpt_path, "log")
    for path in (ckpt_path, log_path):
        storage.refuse_patterns(path)
    return dataclasses.replace(options, ckpt_path=ckpt_path, train_log_path=log_path)


def _default_folder(options: Options, given: dict[str, Any]) -> str:
    """Returns the run folder of a start without --ckpt_path: one for each kind of run."""
    pretrained, kind = options.pretrained_model_checkpoint_path, ""
    if pretrained:
        path = os.path.abspath(pretrained)
        name = os.path.basename(path if os.path.isdir(path) else os.path.dirname(path))
        kind = "-transfer"
    else:
        name = with_given(ModelConfig(), given).name
    if given.get("fine_tune"):
        kind = "-fine-tune"
    recipe, data = given.get("recipe") or "paper", given.get("dataset") or "cifar10"
    parts = [name + kind]
    parts += [part for part, usual in ((recipe, "paper"), (data, "cifar10")) if part != usual]
    return os.path.join("runs", "-".join(parts) + "-coarse" * bool(given.get("coarse_labels")))


def _contains(folder: str, path: str) -> bool:
    """Returns whether a path is the folder, or is inside it."""
    folder = os.path.realpath(folder)
    return os.path.commonpath([folder, os.path.realpath(path)]) == folder


def refuse_export(options: Options) -> None:
    """Refuses an --export_dir that cannot be written, or that contains the run."""
    storage.refuse_patterns(options.export_dir)
    for other in (options.ckpt_path, options.train_log_path):
        if _contains(options.export_dir, other):
            why = f"is invalid: it contains {other}. Use another folder."
            raise UserError(why, "export_dir", options.export_dir)
    storage.refuse_unwritable_folder(options.export_dir)


@contextlib.contextmanager
def lock(directory: str) -> Iterator[storage.HeldLock]:
    """Locks a run's folder against a second trainer. Creates the folder if it is missing.

    A new folder that stays empty is removed again, because the start was refused.
    """
    from cifar10_resnet import checkpoints

    storage.refuse_patterns(directory)
    is_new = not os.path.isdir(directory)
    refusal = UserError(
        "is in use by another trainer. Wait, stop it, or use another folder.",
        "ckpt_path",
        directory,
    )
    try:
        with contextlib.ExitStack() as held:
            try:
                storage.make_folders(directory)
                taken = held.enter_context(storage.lock(directory, refusal))
                # This clears the remains of a process that was killed while it saved. It also
                # tests the folder, which may not be writable although an older lock in it is.
                with checkpoints.saving_folder(directory):
                    pass
            except OSError as error:
                raise unwritable(directory, error) from error
            yield taken
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # It is not empty.
                os.rmdir(directory)


def refuse_other_curves(directory: str, log_path: str) -> None:
    """Refuses a folder of another run's curves, outside of a new run's folder."""
    if not _contains(directory, log_path) and _event_files(log_path):
        why = "is invalid: it contains the curves of another run. Use another folder."
        raise UserError(why, "train_log_path", log_path)


def _event_files(log_path: str) -> list[str]:
    """Returns the event files in a folder that this program wrote."""
    from cifar10_resnet.training.summaries import FILE_SUFFIX

    pattern = f"*/events.out.tfevents.*{FILE_SUFFIX}"
    return glob.glob(os.path.join(glob.escape(log_path), pattern))


def clean(directory: str, log_path: str, needed: str | None = None) -> None:
    """Deletes a run's checkpoints and summaries, and no other files.

    Refuses if the `needed` checkpoint is in the folder. Also refuses a folder with another
    program's checkpoints, or with files but no run.
    """
    from cifar10_resnet import checkpoints

    if needed and os.path.realpath(os.path.dirname(needed)) == os.path.realpath(directory):
        raise UserError(
            f"--clean would delete the pretrained checkpoint {needed}. Use another --ckpt_path."
        )
    for _, prefix in checkpoints.list_checkpoints(directory):
        if not os.path.exists(prefix + ".sha256"):
            raise UserError(
                f"--clean deletes only runs of this program, and another one wrote {prefix}. Use "
                "another --ckpt_path, or remove --clean."
            )
    saved = checkpoints.list_checkpoints(directory, ".sha256")
    events = _event_files(log_path)
    profiles = os.path.join(glob.escape(log_path), "plugins", "profile", "*", "*.xplane.pb")
    others = set(os.listdir(directory)) - {storage.LOCK} if os.path.isdir(directory) else set()
    if not any(files for _, _, files in os.walk(log_path)):
        # An interrupted --clean leaves the folders of the summaries, without their files.
        others.discard(os.path.relpath(log_path, directory))
    state = checkpoints.named_in_state(directory)
    if others and not (saved or events or state):
        raise UserError(
            f"--clean deletes only runs of this program, and {directory} contains none. Use "
            "another --ckpt_path, or remove --clean."
        )
    try:
        if state:
            storage.remove(os.path.join(directory, checkpoints.STATE))
        for _, prefix in saved:
            checkpoints.delete(prefix)
        for file in events + glob.glob(profiles):
            os.remove(file)
    except OSError as error:
        raise unwritable(directory, error) from error
