"""Finds the run that a start belongs to, and builds its trainer, new or resumed."""

import dataclasses
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cifar10_resnet import checkpoints
from cifar10_resnet.config import (
    MAX_ITERATIONS,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    refuse_contradictions,
    training_config,
    with_given,
)
from cifar10_resnet.data import dataset, splits
from cifar10_resnet.data.dataset import Dataset
from cifar10_resnet.distributed.replicas import Replicas
from cifar10_resnet.errors import UserError
from cifar10_resnet.native import kernels
from cifar10_resnet.options import Options
from cifar10_resnet.training import machine
from cifar10_resnet.training.trainer import Trainer


def prepare_run(
    given: dict[str, Any],
    ckpt_path: str | None,
    data: Dataset | None = None,
    train_epochs: float | None = None,
    pretrained: str | None = None,
) -> tuple[RunConfig, Dataset, str | None]:
    """Returns the run in `ckpt_path`, its data set and its newest intact checkpoint.

    Without a run there, it returns a new one and no checkpoint. A new run has the `given` settings
    and starts from the network of the `pretrained` checkpoint, if there is one.
    Without `data`, a run uses its own data set in its default folder.
    """
    if data:
        given = {**given, "dataset": data.name}
    newest, problems = checkpoints.newest_intact(ckpt_path) if ckpt_path else (None, [])
    if newest:
        for reason in problems:
            print(f"Skipped a damaged checkpoint: {reason}", file=sys.stderr, flush=True)
        if pretrained:
            print(f"Resuming the run in {ckpt_path}. {pretrained} is ignored.", flush=True)
        saved = checkpoints.read(newest)
        run = saved.run
        if given.get("fine_tune") and not run.training.fine_tune:
            raise UserError(
                f"--fine_tune does not match the run in {ckpt_path}, which trains all layers. To "
                "fine-tune its network, start a new run: "
                f"--pretrained_model_checkpoint_path={ckpt_path} --fine_tune, with another "
                "--ckpt_path."
            )
        refuse_contradictions(run, given, newest)
        if not saved.is_whole:
            raise UserError(
                f"{newest} cannot be resumed: it contains only the network. Start a new run with "
                f"--pretrained_model_checkpoint_path={ckpt_path} and another --ckpt_path."
            )
    elif problems:
        raise UserError(
            f"{ckpt_path} contains no intact checkpoint: {problems[0]} To start again, add --clean."
        )
    else:
        data = data or dataset.find(None, given.get("dataset"))
        run = _new_run(given, data, pretrained)
    data = data or dataset.find(None, run.data.dataset)
    examples = data.count_without_holdout(run.data.holdout)
    run = _with_fitting_batch(run, examples, given, newest)
    length = {}
    if train_epochs:
        steps = max(1, train_epochs * examples / run.training.batch_size)
        if steps > MAX_ITERATIONS:
            why = f"is invalid: it is more than {MAX_ITERATIONS:,} steps. Use fewer."
            raise UserError(why, "train_epochs", train_epochs)
        length["num_iterations"] = math.ceil(steps)
    if newest:
        refuse_contradictions(run, length, newest)
        return run, data, newest
    return dataclasses.replace(run, training=with_given(run.training, length)), data, None


def _with_fitting_batch(
    run: RunConfig, examples: int, given: dict[str, Any], newest: str | None
) -> RunConfig:
    """Returns the run with a batch that the training images can fill.

    Reduces a new run's default. Refuses a given batch that is too large, because TensorFlow may
    crash or fill the memory. Older versions kept the default batch for fewer images.
    """
    size, default = run.training.batch_size, TrainingConfig.batch_size
    if size <= examples or (newest and size == default):
        return run
    if newest or given.get("batch_size") is not None:
        why = f"is invalid: there are only {examples:,} training images. Use up to {examples:,}."
        raise UserError(why, "batch_size", size)
    print(f"Using --batch_size={examples}, because there are no more training images.", flush=True)
    return dataclasses.replace(run, training=with_given(run.training, {"batch_size": examples}))


def _new_run(given: dict[str, Any], data: Dataset, pretrained: str | None) -> RunConfig:
    model = ModelConfig()
    if pretrained:
        found = checkpoints.find(pretrained, "pretrained_model_checkpoint_path")
        origin, pretrained = found.run, found.prefix
        network = {n: given.get(n) for n in dataclasses.asdict(model) if n != "batch_norm_decay"}
        named_by = "--pretrained_model_checkpoint_path"
        refuse_contradictions(origin, network, pretrained, named_by)
        model = dataclasses.replace(origin.model, batch_norm_decay=model.batch_norm_decay)
    for name in ("fine_tune", "recompute_mean"):
        if given.get(name) and not pretrained:
            raise UserError(
                f"--{name} needs a pretrained network. Add --pretrained_model_checkpoint_path."
            )
    described = data.describe(given.get("coarse_labels") or False)
    return RunConfig(
        with_given(dataclasses.replace(model, num_classes=len(described.class_names)), given),
        with_given(described, given),
        training_config({**given, "pretrained": pretrained}),
    )


def ready(
    run: RunConfig,
    options: Options,
    data: Dataset,
    resume_from: str | None,
    replicas: Replicas,
) -> tuple[Trainer, splits.RunImages]:
    """Returns the trainer, ready to start or resume the run, and the run's images."""
    with ThreadPoolExecutor(1) as reader:
        # The files are read while the network is built and traced.
        reading = reader.submit(splits.load_run, data, run.data, bool(options.epochs_between_evals))
        library = kernels.library(options, replicas.count)
        if replicas.largest(library is None):
            library = None  # All workers use the same kernels.
        now = machine.facts(options, library is not None, replicas)
        if resume_from:
            is_strict = options.deterministic == "strict"
            changes = replicas.from_chief(
                lambda: machine.compare(
                    checkpoints.read(resume_from).machine, now, resume_from, is_strict
                )
            )
            if changes and replicas.is_chief:
                print(changes, flush=True)
        trainer = Trainer(
            run,
            options.data_format,
            options.dtype,
            loss_scale=options.loss_scale,
            jit_compile=options.jit_compile,
            steps_per_call=options.steps_per_call,
            replicas=replicas,
            sync_batch_norm=options.sync_batch_norm,
            native_library=library,
        )
        if resume_from:
            trainer.restore(resume_from)
        elif run.training.pretrained:
            if replicas.is_chief:
                checkpoints.restore_pretrained(trainer.model, run.training.pretrained)
            trainer.copy_from_chief()
        trainer.record_machine(now)
        if trainer.steps_done < options.last_step(run) and not trainer.loops_in_xla:
            trainer.trace()
        images = reading.result()
    if replicas.num_workers > 1:
        replicas.refuse_differences({"SHA-256 of its training images": images.train.digest()})
    if not resume_from:
        trainer.data_mean.assign(images.mean)
    elif not np.array_equal(images.mean, trainer.data_mean.numpy()):
        raise UserError(
            "has other training images than this run. Use the run's data, or another --ckpt_path.",
            "path",
            data.folder or data.name,
        )
    return trainer, images
