"""Checkpoints: saved whole or not at all, found, verified, restored.

A checkpoint is an ordinary `tf.train.Checkpoint` prefix, `model.ckpt-STEP`, with a file of SHA-256
digests beside it. It carries the description of its run (see config.py), so that its path is
all one needs to build the network again.
"""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import tensorflow as tf

from cifar10_resnet import storage
from cifar10_resnet.config import RunConfig
from cifar10_resnet.errors import UserError, reason_of
from resnet_model import ResNet

NAME = "model.ckpt"
DESCRIPTION_KEY = "description/.ATTRIBUTES/VARIABLE_VALUE"
STEP_KEY = "step/.ATTRIBUTES/VARIABLE_VALUE"
STATE = "checkpoint"  # the file by which `tf.train.latest_checkpoint` finds the newest one
# What TensorFlow's reader raises over damaged files, beside errors of its own.
UNREADABLE = (tf.errors.OpError, ValueError, RuntimeError, IndexError, AttributeError)
# In the order in which they move into place: a checkpoint is there once its index is.
SUFFIXES = (".sha256", ".data-00000-of-00001", ".index")


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint that was read: its prefix, the run it belongs to, and the step it was saved at.

    A whole one holds what only training needs too, unlike one that `save_network` wrote.
    """

    prefix: str
    run: RunConfig
    step: int
    is_whole: bool


def save(checkpoint: tf.train.Checkpoint, directory: str, step: int, max_to_keep: int = -1) -> str:
    """Writes `model.ckpt-STEP`, which appears whole or not at all, and returns its prefix.

    Keeps the newest `max_to_keep` checkpoints, or all when that is negative.
    """
    name = f"{NAME}-{step}"
    prefix = os.path.join(directory, name)
    _refuse_newcomers(directory, step)
    try:
        with saving_folder(directory) as folder:
            written = checkpoint.write(os.path.join(folder, name))
            with open(written + ".sha256", "w") as digests:
                for suffix in SUFFIXES[1:]:
                    digests.write(f"{storage.digest(written + suffix)}  {name}{suffix}\n")
            for suffix in SUFFIXES:
                storage.sync(written + suffix)
            # Where a damaged one is replaced, it stops counting as a checkpoint first.
            storage.remove(prefix + ".index")
            for suffix in SUFFIXES:
                os.replace(written + suffix, prefix + suffix)
        _delete_remains(directory)
        kept = []
        for saved_step, saved in list_checkpoints(directory):
            if saved_step > step:
                delete(saved)  # a damaged one that this run was resumed without
            else:
                kept.append(saved)
        surplus = max(0, len(kept) - max(1, max_to_keep)) if max_to_keep >= 0 else 0
        # This syncs the folder too: the new checkpoint is on the disk before an old one goes.
        _write_state(directory, kept[surplus:])
        for old in kept[:surplus]:
            delete(old)
    except (OSError, UserError, tf.errors.OpError) as error:
        raise UserError(
            f"{prefix} cannot be saved: {reason_of(error)}. Older checkpoints are unchanged. Free "
            "some space or fix the folder, and run the same command."
        ) from error
    return prefix


def _refuse_newcomers(directory: str, step: int) -> None:
    """Refuses to save beside an intact checkpoint that this run would have gone on from."""
    for saved_step, prefix in list_checkpoints(directory):
        if saved_step > step and _is_intact(prefix):
            raise UserError(
                f"{prefix} appeared while this run was at step {step}. Nothing was changed. Use a "
                "separate --ckpt_path for each run."
            )


def list_checkpoints(directory: str, suffix: str = ".index") -> list[tuple[int, str]]:
    """The checkpoints of a folder as (step, prefix), oldest first, intact or not."""
    found = []
    for file in glob.glob(os.path.join(glob.escape(directory), f"{NAME}-*{suffix}")):
        prefix = file.removesuffix(suffix)
        if match := re.fullmatch(rf"{re.escape(NAME)}-(\d+)", os.path.basename(prefix)):
            found.append((int(match[1]), prefix))
    return sorted(found)


def newest_intact(directory: str) -> tuple[str | None, list[str]]:
    """The newest checkpoint that verifies, or None; and what is wrong with each newer one."""
    passed_over = []
    with_index, with_digests = list_checkpoints(directory), list_checkpoints(directory, ".sha256")
    if not with_index:  # at most the remains of a first save that was killed
        refuse_foreign(directory)
        if names := named_in_state(directory):
            passed_over.append(
                f"{os.path.join(directory, names[-1])} is missing, but the file `{STATE}` lists "
                "it. Copy it there, or start again with --clean."
            )
        return None, passed_over
    for _, prefix in sorted({*with_index, *with_digests}, reverse=True):
        try:
            verify(prefix)
            return prefix, passed_over
        except UserError as error:
            passed_over.append(str(error))
    return None, passed_over


def refuse_foreign(directory: str) -> None:
    """Refuses a folder that has checkpoints of another program: saving would hide them."""
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    if foreign := [name for name in names if name.endswith(".index")]:
        raise UserError(
            f"contains checkpoints of another program ({foreign[0]}). Use another folder.",
            "ckpt_path",
            directory,
        )


def find(path: str, argument: str = "ckpt_path") -> SavedRun:
    """Returns the checkpoint at `path`, or the newest one of that folder, verified."""
    storage.refuse_patterns(path)
    if os.path.isdir(path):
        found = list_checkpoints(path)
        if not found:
            why = "contains no checkpoint. Pass a run folder, such as runs/resnet20."
            raise UserError(why, argument, path)
        prefix = found[-1][1]
    else:
        prefix = re.sub(r"\.(index|sha256|data-\d+-of-\d+)$", "", path)
        if not any(os.path.exists(prefix + suffix) for suffix in SUFFIXES):
            raise UserError(
                "does not exist. Pass a run folder or a checkpoint, such as "
                f"runs/resnet20/{NAME}-1000.",
                argument,
                path,
            )
    verify(prefix)
    return read(prefix)


def find_all(path: str) -> list[SavedRun]:
    """Returns all checkpoints of the folder that `path` names or lies in, verified."""
    found = {saved.prefix: saved for saved in [find(path)]}
    for _, prefix in list_checkpoints(os.path.dirname(*found)):
        if prefix not in found:
            verify(prefix)
            found[prefix] = read(prefix)
    return sorted(found.values(), key=lambda saved: saved.step)


def verify(prefix: str) -> None:
    """Refuses a checkpoint of which a part is missing or was changed since it was written."""
    for suffix in SUFFIXES[1:]:
        if not os.path.exists(prefix + suffix):
            raise UserError(
                f"{prefix} is incomplete: {os.path.basename(prefix + suffix)} is missing. Use "
                "another checkpoint."
            )
    try:
        with open(prefix + ".sha256", encoding="utf-8") as digests:
            lines = [line.split() for line in digests]
            # by what they end in, so that a copy under another name verifies too
            expected = {name[name.index(".", len(NAME)) :]: digest for digest, name in lines}
    except FileNotFoundError:
        return _verify_tensors(prefix)
    except (OSError, ValueError) as error:
        raise UserError(f"{prefix} is damaged: {prefix}.sha256 cannot be read.") from error
    for suffix in SUFFIXES[1:]:
        file = prefix + suffix
        try:
            intact = storage.digest(file) == expected.get(suffix)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}.") from error
        if not intact:
            raise UserError(
                f"{prefix} is damaged: the SHA-256 of {os.path.basename(file)} differs. Use "
                "another checkpoint."
            )


def _is_intact(prefix: str) -> bool:
    try:
        verify(prefix)
    except UserError:
        return False
    return True


def _verify_tensors(prefix: str) -> None:
    """Reads all that is there, whereby TensorFlow compares a checksum of its own of each tensor."""
    try:
        reader = tf.train.load_checkpoint(prefix)
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
    except UNREADABLE as error:
        raise UserError(
            f"{prefix} is damaged, or still being copied: {reason_of(error)}. Use another "
            "checkpoint."
        ) from error


def read(prefix: str) -> SavedRun:
    """Reads what a checkpoint says of itself, and none of its weights."""
    try:
        reader = tf.train.load_checkpoint(prefix)
        if not reader.has_tensor(DESCRIPTION_KEY):
            raise UserError("another program wrote this checkpoint.")
        run = RunConfig.from_json(reader.get_tensor(DESCRIPTION_KEY).decode())
        step = int(reader.get_tensor(STEP_KEY))
        names = reader.get_variable_to_shape_map()
        return SavedRun(prefix, run, step, any(name.startswith("momentum/") for name in names))
    except UserError as error:
        raise UserError(f"{prefix} cannot be used: {error}") from error
    except UNREADABLE as error:
        raise UserError(f"{prefix} cannot be read as a checkpoint: {reason_of(error)}") from error


def restore(checkpoint: tf.train.Checkpoint, prefix: str) -> None:
    """Restores a whole run: every object of `checkpoint`, and every value of the file."""
    with _restoring(prefix):
        # expect_partial: what is left over is told once, as an error, and not again at the exit
        status = checkpoint.read(prefix).expect_partial()
        status.assert_existing_objects_matched().assert_consumed()


def restore_model(model: ResNet, prefix: str) -> None:
    """Restores the network alone, whatever else the checkpoint holds."""
    with _restoring(prefix):
        status = tf.train.Checkpoint(model=model).read(prefix).expect_partial()
        status.assert_existing_objects_matched()


def restore_pretrained(model: ResNet, prefix: str) -> None:
    """Restores all of the network but its final layer, whatever classes the checkpoint is for."""
    final = {variable.ref() for variable in model.final_layer}
    for variable, value in zip(model.variables, load(read(prefix)).variables, strict=True):
        if variable.ref() not in final:
            variable.assign(value)


@contextlib.contextmanager
def _restoring(prefix: str) -> Iterator[None]:
    try:
        yield
    except (*UNREADABLE, AssertionError) as error:
        raise UserError(f"{prefix} cannot be restored: {reason_of(error)}") from error


def save_network(saved: SavedRun, directory: str) -> str:
    """Saves the network of a checkpoint alone, without what only training needs."""
    network = tf.train.Checkpoint(
        model=load(saved),
        step=tf.Variable(saved.step, dtype=tf.int64),
        description=tf.Variable(saved.run.to_json()),
    )
    return save(network, directory, saved.step)


def load(saved: SavedRun, data_format: str = "channels_last", dtype: str = "fp32") -> ResNet:
    """Builds the network that a checkpoint describes, with its weights, statistics and mean."""
    model = ResNet(**saved.run.model.arguments(), data_format=data_format, dtype=dtype)
    restore_model(model, saved.prefix)
    return model


def named_in_state(directory: str) -> list[str]:
    """The checkpoints that the folder's STATE names, where all of them are named as ours are."""
    try:
        with open(os.path.join(directory, STATE), encoding="utf-8") as state:
            names = re.findall(r'checkpoint_paths?: "(.*)"', state.read())
    except (OSError, UnicodeDecodeError):
        return []
    is_own = all(re.fullmatch(rf"{re.escape(NAME)}-\d+", name) for name in names)
    return names if is_own else []


@contextlib.contextmanager
def saving_folder(directory: str) -> Iterator[str]:
    """An empty folder in a run's, where a checkpoint is written before it moves to its place."""
    folder = os.path.join(directory, ".saving")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_state(directory: str, prefixes: list[str]) -> None:
    """Writes STATE, with the newest checkpoint last."""
    names = [os.path.basename(prefix) for prefix in prefixes]
    lines = [f'model_checkpoint_path: "{names[-1]}"\n']
    lines += [f'all_model_checkpoint_paths: "{name}"\n' for name in names]
    storage.new_file(os.path.join(directory, STATE), "".join(lines).encode())


def delete(prefix: str) -> None:
    """Deletes a checkpoint, which stops counting as one first."""
    for suffix in reversed(SUFFIXES):
        storage.remove(prefix + suffix)


def _delete_remains(directory: str) -> None:
    """Deletes what is left of checkpoints of which a kill cut the saving or the deleting short."""
    for _, prefix in list_checkpoints(directory, ".sha256"):
        if not os.path.exists(prefix + ".index"):
            delete(prefix)
