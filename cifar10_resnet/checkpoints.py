"""Saves, finds, verifies and restores checkpoints.

A checkpoint is an ordinary `tf.train.Checkpoint`, `model.ckpt-STEP`, with a file of SHA-256 digests
next to it. It contains the description of its run (see config.py), so its path is enough to build
the network again.
"""

import contextlib
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import tensorflow as tf

from cifar10_resnet import storage
from cifar10_resnet.config import MAX_ITERATIONS, RunConfig
from cifar10_resnet.errors import UserError, reason_of, unreadable
from resnet_model import ResNet

NAME = "model.ckpt"
DESCRIPTION_KEY = "description/.ATTRIBUTES/VARIABLE_VALUE"
AVERAGED_KEY = "average/count/.ATTRIBUTES/VARIABLE_VALUE"
STEP_KEY = "step/.ATTRIBUTES/VARIABLE_VALUE"
# The description of a run may contain facts about the machine of its last start. They are optional.
MACHINE = "machine"
STATE = "checkpoint"  # the file where `tf.train.latest_checkpoint` finds the newest one
# TensorFlow's reader raises any of these over a damaged file, not only its own errors.
UNREADABLE = (tf.errors.OpError, ValueError, RuntimeError, IndexError, AttributeError, TypeError)
# The files move into place in this order. The index comes last: it makes them a checkpoint.
SUFFIXES = (".sha256", ".data-00000-of-00001", ".index")


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint that was read: its prefix, its run and its step.

    `is_whole` is false if it contains only the network, because `save_network` wrote it. `machine`
    has the facts about the machine of the run's last start, if they were recorded.
    """

    prefix: str
    run: RunConfig
    step: int
    is_whole: bool
    machine: dict[str, str] = field(default_factory=dict, compare=False)


def save(checkpoint: tf.train.Checkpoint, directory: str, step: int, max_to_keep: int = -1) -> str:
    """Writes `model.ckpt-STEP`, which appears only once it is complete, and returns its prefix.

    Keeps the newest `max_to_keep` checkpoints and at least one, or all if that is negative.
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
            # A damaged checkpoint of this step stops counting as one before it is replaced.
            storage.remove(prefix + ".index")
            for suffix in SUFFIXES[:-1]:
                os.replace(written + suffix, prefix + suffix)
            # The index must not reach the disk before the files that it makes a checkpoint.
            storage.sync(directory)
            os.replace(written + SUFFIXES[-1], prefix + SUFFIXES[-1])
        _delete_remains(directory)
        kept = []
        for saved_step, saved in list_checkpoints(directory):
            if saved_step > step:
                delete(saved)  # a damaged one that this run skipped when it resumed
            else:
                kept.append(saved)
        surplus = max(0, len(kept) - max(1, max_to_keep)) if max_to_keep >= 0 else 0
        # This syncs the folder too. The new checkpoint is on the disk before old ones are deleted.
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
    """Refuses to save if an intact checkpoint of a later step has appeared in the folder."""
    for saved_step, prefix in list_checkpoints(directory):
        if saved_step > step and _is_intact(prefix):
            raise UserError(
                f"{prefix} appeared while this run was at step {step}. Nothing was changed. Use a "
                "separate --ckpt_path for each run."
            )


def list_checkpoints(directory: str, suffix: str = ".index") -> list[tuple[int, str]]:
    """Returns the checkpoints of a folder as (step, prefix), oldest first, intact or not."""
    found = []
    for file in glob.glob(os.path.join(glob.escape(directory), f"{NAME}-*{suffix}")):
        prefix = file.removesuffix(suffix)
        if match := re.fullmatch(rf"{re.escape(NAME)}-(\d+)", os.path.basename(prefix)):
            found.append((int(match[1]), prefix))
    return sorted(found)


def newest_intact(directory: str) -> tuple[str | None, list[str]]:
    """Returns the newest intact checkpoint, or None, and what is wrong with each newer one."""
    problems = []
    with_index, with_digests = list_checkpoints(directory), list_checkpoints(directory, ".sha256")
    if not with_index:  # at most the remains of a first save that was killed
        refuse_foreign(directory)
        if names := named_in_state(directory):
            problems.append(
                f"{os.path.join(directory, names[-1])} is missing, but the file `{STATE}` lists "
                "it. Copy it there, or start again with --clean."
            )
        return None, problems
    for _, prefix in sorted({*with_index, *with_digests}, reverse=True):
        try:
            verify(prefix)
            return prefix, problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def refuse_foreign(directory: str) -> None:
    """Refuses a folder with checkpoints of another program, because saving would hide them."""
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


def find_all(path: str) -> tuple[list[SavedRun], list[UserError]]:
    """Returns all intact checkpoints of a folder, and the reasons to skip the others.

    `path` is the folder, or one of its checkpoints.
    """
    found = {} if os.path.isdir(path) else {saved.prefix: saved for saved in [find(path)]}
    problems = []
    for _, prefix in list_checkpoints(os.path.dirname(*found) if found else path):
        try:
            found[prefix] = found.get(prefix) or find(prefix)
        except UserError as problem:
            problems.append(problem)
    if not found:
        find(path)  # It refuses, and says why.
    return sorted(found.values(), key=lambda saved: saved.step), problems


def verify(prefix: str) -> None:
    """Refuses a checkpoint if its index or its data is missing, or changed after the save."""
    for suffix in SUFFIXES[1:]:
        if not os.path.exists(prefix + suffix):
            raise UserError(
                f"{prefix} is incomplete: {os.path.basename(prefix + suffix)} is missing. Use "
                "another checkpoint."
            )
    try:
        with open(prefix + ".sha256", encoding="utf-8") as digests:
            lines = [line.split() for line in digests]
            # Only the endings of the names count, so a renamed copy verifies too.
            expected = {name[name.index(".", len(NAME)) :]: digest for digest, name in lines}
    except FileNotFoundError:
        return _verify_tensors(prefix)
    except (OSError, ValueError) as error:
        why = f"{prefix}.sha256 cannot be read. Use another checkpoint."
        raise UserError(f"{prefix} is damaged: {why}") from error
    for suffix in SUFFIXES[1:]:
        file = prefix + suffix
        try:
            intact = storage.digest(file) == expected.get(suffix)
        except OSError as error:
            raise unreadable(file, error) from error
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
    """Reads every tensor, because TensorFlow then verifies its own checksum of each."""
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
    """Reads a checkpoint's description and step, but none of its weights."""
    try:
        reader = tf.train.load_checkpoint(prefix)
        if not reader.has_tensor(DESCRIPTION_KEY):
            raise UserError("another program wrote this checkpoint. Use another folder.")
        description = reader.get_tensor(DESCRIPTION_KEY).decode()
        run = RunConfig.from_json(description)
        machine = json.loads(description).get(MACHINE)
        machine = machine if isinstance(machine, dict) else {}
        step = int(reader.get_tensor(STEP_KEY))
        if not 0 <= step <= MAX_ITERATIONS:
            raise UserError(f"its step is {step}. Use another checkpoint.")
        names = reader.get_variable_to_shape_map()
        is_whole = any(name.startswith("momentum/") for name in names)
        return SavedRun(prefix, run, step, is_whole, machine)
    except UserError as error:
        raise UserError(f"{prefix} cannot be used: {error}") from error
    except UNREADABLE as error:
        why = f"{reason_of(error)}. Use another checkpoint."
        raise UserError(f"{prefix} is damaged: {why}") from error


def restore(
    checkpoint: tf.train.Checkpoint,
    prefix: str,
    optional: Mapping[str, tf.Module] | None = None,
) -> None:
    """Restores a whole run: every object of `checkpoint` and every value in the file.

    If the file does not contain an `optional` part, that part is unchanged.
    """
    with _restoring(prefix):
        names = tf.train.load_checkpoint(prefix).get_variable_to_shape_map()
        in_file = {name.partition("/")[0] for name in names}
        more = {name: part for name, part in (optional or {}).items() if name in in_file}
        # Without expect_partial(), TensorFlow warns of unused values again at the exit.
        status = tf.train.Checkpoint(checkpoint, **more).read(prefix).expect_partial()
        status.assert_existing_objects_matched().assert_consumed()


def restore_model(model: ResNet, prefix: str) -> None:
    """Restores only the network: the average of the run's last epochs, if there is one."""
    with _restoring(prefix):
        part = tf.train.Checkpoint(model=model)
        reader = tf.train.load_checkpoint(prefix)
        if reader.has_tensor(AVERAGED_KEY) and reader.get_tensor(AVERAGED_KEY) > 0:
            part = tf.train.Checkpoint(average=tf.train.Checkpoint(network=model))
        status = part.read(prefix).expect_partial()
        status.assert_existing_objects_matched()


def restore_pretrained(model: ResNet, prefix: str) -> None:
    """Restores the network except its final layer. The checkpoint may have other classes."""
    final = {variable.ref() for variable in model.final_layer}
    for variable, value in zip(model.variables, load(read(prefix)).variables, strict=True):
        if variable.ref() not in final:
            variable.assign(value)


@contextlib.contextmanager
def _restoring(prefix: str) -> Iterator[None]:
    try:
        yield
    except (*UNREADABLE, AssertionError) as error:
        why = f"{reason_of(error)}. Use another checkpoint."
        raise UserError(f"{prefix} cannot be restored: {why}") from error


def save_network(saved: SavedRun, directory: str) -> str:
    """Saves only the network of a checkpoint, without its training state. Returns the prefix."""
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
    """Returns the checkpoints that the folder's STATE lists, or none if a name is foreign."""
    try:
        with open(os.path.join(directory, STATE), encoding="utf-8") as state:
            names = re.findall(r'checkpoint_paths?: "(.*)"', state.read())
    except (OSError, UnicodeDecodeError):
        return []
    is_own = all(re.fullmatch(rf"{re.escape(NAME)}-\d+", name) for name in names)
    return names if is_own else []


@contextlib.contextmanager
def saving_folder(directory: str) -> Iterator[str]:
    """Yields an empty folder in the run folder, for writing a checkpoint before it moves."""
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
    """Deletes a checkpoint, its index first, so the remains never count as a checkpoint."""
    for suffix in reversed(SUFFIXES):
        storage.remove(prefix + suffix)


def _delete_remains(directory: str) -> None:
    """Deletes the remains of checkpoints if a kill interrupted a save or a deletion."""
    for _, prefix in list_checkpoints(directory, ".sha256"):
        if not os.path.exists(prefix + ".index"):
            delete(prefix)
