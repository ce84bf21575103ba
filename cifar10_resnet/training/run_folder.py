"""A run's folder: held against a second trainer, and cleaned for a new run."""

import contextlib
import glob
import os
from collections.abc import Iterator

from cifar10_resnet import checkpoints, storage
from cifar10_resnet.errors import UserError
from cifar10_resnet.training.summaries import FILE_SUFFIX

EVENTS = f"events.out.tfevents.*{FILE_SUFFIX}"


@contextlib.contextmanager
def lock(directory: str) -> Iterator[None]:
    """Holds a run's folder, created where missing, against a second trainer.

    A folder that was created and stayed empty is removed again: the start was refused.
    """
    storage.refuse_patterns(directory)
    is_new = not os.path.isdir(directory)
    refusal = (
        f"--ckpt_path={directory} is in use by another trainer. Wait, stop it, or use another "
        "folder."
    )
    try:
        with contextlib.ExitStack() as held:
            try:
                os.makedirs(directory, exist_ok=True)
                held.enter_context(storage.lock(directory, refusal))
                # Clears what a process that was killed while it saved has left behind, and shows
                # that this one may save: an older lock may be writable in a folder that is not.
                with checkpoints.saving_folder(directory):
                    pass
            except OSError as error:
                raise UserError(f"cannot write to {directory}: {error.strerror}.") from error
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # It is not empty.
                os.rmdir(directory)


def clean(directory: str, log_path: str, needed: str | None = None) -> None:
    """Deletes a run's checkpoints and summaries, and nothing that this project did not write.

    Refuses to where the checkpoint that `needed` names is among them, or is none; and where there
    are files, but none of a run.
    """
    origin = os.path.dirname(checkpoints.find(needed)) if needed else None
    if needed and os.path.realpath(origin) == os.path.realpath(directory):
        raise UserError(
            f"--clean would delete {needed}, from which the run is to start: name another "
            "--ckpt_path."
        )
    for _, prefix in checkpoints.list_checkpoints(directory):
        if not os.path.exists(prefix + ".sha256"):
            raise UserError(
                f"--clean leaves {directory} alone: {os.path.basename(prefix)} there was not "
                "written by this project."
            )
    saved = checkpoints.list_checkpoints(directory, ".sha256")
    events, profiles = (
        glob.glob(os.path.join(glob.escape(log_path), files))
        for files in ("*/" + EVENTS, "plugins/profile/*/*.xplane.pb")
    )
    others = set(os.listdir(directory)) - {storage.LOCK} if os.path.isdir(directory) else set()
    if not any(files for _, _, files in os.walk(log_path)):
        # An interrupted --clean leaves the folders of the summaries, without their files.
        others.discard(os.path.relpath(log_path, directory))
    state = checkpoints.named_in_state(directory)
    if others and not (saved or events or state):
        raise UserError(
            f"--clean leaves {directory} alone: nothing in it is of a run of this project; name "
            "another --ckpt_path, or leave out --clean."
        )
    try:
        if state:
            storage.remove(os.path.join(directory, checkpoints.STATE))
        for _, prefix in saved:
            checkpoints.delete(prefix)
        for file in events + profiles:
            os.remove(file)
    except OSError as error:
        raise UserError(f"cannot clean {directory}: {error.strerror}.") from error
