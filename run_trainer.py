"""Trains a ResNet on CIFAR-10, CIFAR-100, your own photos or synthetic images.

python run_trainer.py --path=cifar-10-batches-bin --num_layers=20
"""

import contextlib
import dataclasses
import functools
import json
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cifar10_resnet import device
from cifar10_resnet.cli import app
from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.data import dataset
from cifar10_resnet.data.dataset import Dataset
from cifar10_resnet.distributed import cluster
from cifar10_resnet.options import Options
from cifar10_resnet.storage import HeldLock
from cifar10_resnet.terminal import command, emphasised, quietly, table
from cifar10_resnet.training import run_folder

if TYPE_CHECKING:
    import tensorflow as tf

    from cifar10_input import ImageSet
    from cifar10_resnet.cli.flags import Flags
    from cifar10_resnet.distributed.replicas import Replicas
    from cifar10_resnet.training.loop import Outcome
    from cifar10_resnet.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Settings(Options, TrainingConfig, ModelConfig, DataConfig):
    """The settings of a start. --help shows the settings of the last base class first."""


def main(flags: "Flags") -> int:
    """Settles the run and its devices, trains it, and prints how it ended."""
    options = flags.make(Options)
    typed = flags.given(ModelConfig, DataConfig, TrainingConfig)
    options.refuse_beside(typed)
    name = "synthetic" if options.use_synthetic_data else flags.dataset
    data = dataset.find_asked(options.path, name)
    given = typed | {"dataset": data and data.name}
    options = run_folder.settle(options, given)
    workers = cluster.from_environment(options.distribution_strategy)
    if options.export_dir and (workers is None or workers.index == 0):  # the chief
        run_folder.refuse_export(options)

    device.start_tensorflow(
        *(options.device, options.verbose, options.num_gpus),
        # Like run_evaluator.py, --eval_only computes fp32 exactly.
        tf32=options.tf32 and not options.eval_only,
        deterministic=options.deterministic,
    )
    from cifar10_resnet import checkpoints
    from cifar10_resnet.distributed import replicas as distributed
    from cifar10_resnet.serving import export

    if workers and not options.quiet:
        print(f"Joining the others as {workers.name(workers.index)}.", flush=True)
    # TensorFlow needs this before it computes anything.
    replicas = distributed.choose(options.distribution_strategy, workers, options.worker_timeout)
    options = _settled(options, replicas.count)
    with replicas.ending_together(), contextlib.ExitStack() as held:
        replicas.refuse_differences(flags.in_common())
        if options.eval_only:
            report = replicas.from_chief(lambda: _evaluate(options, data, typed))
            if replicas.is_chief:
                print(report)
            return 0
        lock = None

        def prepare() -> str:
            nonlocal lock
            lock = held.enter_context(run_folder.lock(options.ckpt_path))
            return _prepare(options, data, given)

        run, found, resume_from = json.loads(replicas.from_chief(prepare))
        run, data = RunConfig.from_json(run), data or Dataset(*found)
        if options.verbose and replicas.is_chief:
            settings = run.settings() | dataclasses.asdict(options)
            print(table((settings | {"log_per_iterations": options.steps_per_log(run)}).items()))
        with quietly(options.quiet):
            outcome = train(run, options, data, resume_from, replicas, lock)
            if options.export_dir and replicas.is_chief and not outcome.stopped_by:
                # With "auto", a network that was trained on a GPU is exported to run anywhere.
                layout = "channels_last" if flags.data_format == "auto" else flags.data_format
                export.export_saved_model(
                    checkpoints.read(outcome.checkpoint), options.export_dir, layout, options.dtype
                )
    if replicas.is_chief:
        _show(run, outcome, options, flags.dataset)
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def train(
    run: RunConfig,
    options: Options,
    data: Dataset | None = None,
    resume_from: str | None = None,
    replicas: "Replicas | None" = None,
    lock: HeldLock | None = None,
) -> "Outcome":
    """Trains a run from its start, or from its checkpoint `resume_from`, and returns the outcome.

    Without `data`, it uses its own data set in its default folder. If several workers train
    together, only the chief reads and writes checkpoints. With the `lock` of the run's folder,
    training ends if the folder is moved.
    """
    from cifar10_resnet.distributed.replicas import Replicas
    from cifar10_resnet.training import loop, progress, resume, signals

    options = run_folder.settle(options, run.settings())
    data, replicas = data or dataset.find(None, run.data.dataset), replicas or Replicas()
    options = _settled(options, replicas.count)
    trainer, images = resume.ready(run, options, data, resume_from, replicas)
    num_images, step = len(images.train.labels), trainer.steps_done
    agenda = loop.Agenda(run, options, num_images, replicas.num_workers)
    evaluations = loop.Evaluations(trainer, options, images)
    say = print if replicas.is_chief else lambda line: None
    if over := loop.reason_to_end(trainer, agenda, evaluations, resume_from):
        say(over)
        return loop.Outcome(step, resume_from, evaluations.metrics)
    say(progress.opening(run, options, trainer, num_images, agenda.last, resume_from))

    batches_from = _prepare_batches(trainer, options, images.train)
    kind = progress.Progress if replicas.is_chief else progress.Silent
    saving = loop.Saving(trainer, options, lock)
    with (
        signals.StopSignals() as stop,
        kind(
            *(run, step, agenda.last, num_images / run.training.batch_size),
            *(options.train_log_path, options.profile_steps),
        ) as shown,
        signals.saving_on_closed_output(saving.check, saving.save),
    ):
        return loop.train(trainer, batches_from, agenda, evaluations, saving, shown, stop)


def _settled(options: Options, num_replicas: int) -> Options:
    """Returns the options with every "auto" settled for the devices that TensorFlow uses."""
    found = device.visible_device()
    layout = device.resolve_data_format(options.data_format, options.dtype, found)
    return options.settled(found, layout, num_replicas)


def _prepare_batches(
    trainer: "Trainer", options: Options, examples: "ImageSet"
) -> "Callable[..., tf.data.Dataset]":
    """Returns the function from a step to the run's batches from this step on.

    On one GPU, they contain only what is drawn, and the trainer makes the images from it.
    """
    from cifar10_input import DeviceAugmentation, training_batches

    training, mean = trainer.run.training, trainer.model.image_mean.numpy()
    replicas = trainer.replicas
    is_small = examples.images.nbytes <= DeviceAugmentation.MOST_BYTES
    on_gpu = options.device == "gpu" and replicas.count == 1 and is_small
    if on_gpu:
        trainer.make_batch = DeviceAugmentation(examples, mean, training.cutout)
    return functools.partial(
        training_batches,
        *(examples, mean, training.batch_size, training.seed),
        alternate_flips=training.alternate_flips,
        cutout=training.cutout,
        share=(replicas.worker, replicas.num_workers),
        drawn_only=on_gpu,
    )


def _evaluate(options: Options, data: Dataset | None, typed: dict[str, Any]) -> str:
    """Evaluates the run's newest checkpoint, and returns the text to print."""
    from cifar10_resnet.evaluation import evaluator

    with quietly(options.quiet):
        scored = evaluator.score_newest(
            options.ckpt_path, data, options.data_format, options.dtype, typed
        )
    return scored.line() if options.quiet else scored.report()


def _prepare(options: Options, data: Dataset | None, given: dict[str, Any]) -> str:
    """Returns, as JSON, the run, its data set and its checkpoint to resume from, if any."""
    from cifar10_resnet.training import resume

    with quietly(options.quiet):
        run, data, resume_from = resume.prepare_run(
            *(given, None if options.clean else options.ckpt_path),
            *(data, options.train_epochs, options.pretrained_model_checkpoint_path),
        )
    if options.clean:  # only now that the new run passed its checks
        run_folder.clean(options.ckpt_path, options.train_log_path, run.training.pretrained)
    elif not resume_from:
        run_folder.refuse_other_curves(options.ckpt_path, options.train_log_path)
    return json.dumps([run.to_json(), [data.name, data.folder], resume_from])


def _show(run: RunConfig, outcome: "Outcome", options: Options, dataset_name: str | None) -> None:
    """Prints how the run ended, and what to do next."""
    title = f"{run.model.name}, step {outcome.step:,} of {run.training.num_iterations:,}"
    rows = dict(outcome.summary)
    if outcome.stopped_by:
        stopped_by = signal.Signals(outcome.stopped_by)
        name = "Ctrl-C" if stopped_by == signal.SIGINT else stopped_by.name
        again = "the same command without --clean" if options.clean else "the same command"
        rows["stopped"] = f"by {name} (run {again} to resume)"
    words = [f"--ckpt_path={outcome.checkpoint}"]
    if run.data.dataset != "synthetic":
        given = {"path": options.path, "dataset": dataset_name}
        words += [f"--{name}={value}" for name, value in given.items() if value is not None]
    if run.data.holdout:
        words.append("--split=holdout")
    rows["evaluate"] = command("run_evaluator.py", *words)
    print(emphasised(title, sys.stdout))
    print(table(rows.items()))


if __name__ == "__main__":
    app.run(main, Settings)
