"""Trains a ResNet on CIFAR-10, CIFAR-100, your own photos or synthetic images.

python run_trainer.py --path=cifar-10-batches-bin --num_layers=20
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys

from absl import flags

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.cli import flags as command_line
from cifar10_resnet.cli.guard import exits_with_a_sentence
from cifar10_resnet.config import (
    MAX_SEED,
    OPTIMIZERS,
    RECIPES,
    ModelConfig,
    Options,
    RunConfig,
    units_per_block,
)
from cifar10_resnet.data import dataset
from cifar10_resnet.device import resolve_data_format, start_tensorflow
from cifar10_resnet.distributed import cluster
from cifar10_resnet.errors import UserError
from cifar10_resnet.terminal import command, emphasised, table

FLAGS = flags.FLAGS


class StepRange(flags.ArgumentParser):
    """The first and the last of some steps, as in 100,110."""

    syntactic_help = "a first and a last step, as in 100,110"

    def parse(self, argument: str) -> tuple[int, int]:
        first, last = map(int, argument.split(","))
        if not 1 <= first <= last:
            raise ValueError(argument)
        return first, last


flags.adopt_module_key_flags(command_line)
flags.DEFINE_string(
    "ckpt_path",
    None,
    "Folder for the checkpoints (default: runs/resnet20, runs/resnet20-fast and so on).",
)
flags.DEFINE_alias("model_dir", "ckpt_path")
flags.DEFINE_string(
    "pretrained_model_checkpoint_path",
    None,
    "Start from the network of this checkpoint (prefix or folder), but for its final layer.",
)
flags.DEFINE_bool("fine_tune", False, "Train the final layer alone; all below it stays frozen.")
flags.DEFINE_bool(
    "recompute_mean", False, "Subtract the new images' mean, not the pretrained network's."
)
flags.DEFINE_string("train_log_path", None, "Folder for TensorBoard (default: log in --ckpt_path).")
flags.DEFINE_enum("recipe", "paper", list(RECIPES), "Schedule and hyperparameters to start from.")
flags.DEFINE_integer("batch_size", 128, "Images in a step.", lower_bound=1)
flags.DEFINE_integer(
    "num_iterations", None, "Length in steps (default: the recipe's; paper: 64000).", lower_bound=1
)
flags.DEFINE_float("train_epochs", None, "Length in epochs, instead of in steps.", lower_bound=1e-9)
flags.DEFINE_integer(
    "max_train_steps", None, "Stop after this step, the schedule being as it is.", lower_bound=1
)
flags.DEFINE_float(
    "init_lr",
    None,
    "Learning rate, or its peak (default: the recipe's; paper: 0.1).",
    lower_bound=0,
)
flags.DEFINE_enum(
    "optimizer",
    None,
    list(OPTIMIZERS),
    "What steps are made of (default: the recipe's; paper: momentum; fast: muon).",
)
flags.DEFINE_bool(
    "scale_lr", False, "Multiply the learning rate by --batch_size / 128, the linear rule."
)
flags.DEFINE_float("momentum", None, "Momentum (default: 0.9).", lower_bound=0, upper_bound=1)
flags.DEFINE_bool("nesterov", None, "Nesterov's momentum (default: the recipe's; paper: false).")
flags.DEFINE_float(
    "weight_decay", None, "L2 on the kernels (default: the recipe's; paper: 2e-4).", lower_bound=0
)
flags.DEFINE_float(
    "batch_norm_decay", 0.99, "Share that batch-norm averages keep.", lower_bound=0, upper_bound=1
)
flags.DEFINE_float(
    "label_smoothing",
    None,
    "Share of each label spread over all classes (default: the recipe's; paper: 0).",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_integer(
    "cutout",
    None,
    "Blank a square this many pixels wide in each picture (default: the recipe's; paper: 0).",
    lower_bound=0,
)
flags.DEFINE_integer(
    "seed",
    0,
    "Of the weights, the order, the crops and the flips.",
    lower_bound=0,
    upper_bound=MAX_SEED,
)
flags.DEFINE_integer(
    "holdout", 0, "Keep the last N training images out of training.", lower_bound=0
)
flags.DEFINE_bool("use_synthetic_data", False, "Train on generated pictures; needs no --path.")
flags.DEFINE_bool("jit_compile", False, "Compile the step with XLA; on CPUs that is slower.")
flags.DEFINE_integer(
    "steps_per_call", 1, "Steps between two returns to Python; for GPUs.", lower_bound=1
)
flags.DEFINE_enum(
    "distribution_strategy",
    "auto",
    list(cluster.STRATEGIES),
    "Devices: the workers of TF_CONFIG, all of this machine's GPUs, or one; auto is the most.",
)
flags.DEFINE_integer(
    "num_gpus", None, "GPUs of this machine to use (default: all that are visible).", lower_bound=0
)
flags.DEFINE_bool(
    "sync_batch_norm", False, "Batch statistics over the whole batch, not each replica's part."
)
flags.DEFINE_float(
    "worker_timeout", 60, "Seconds of silence after which a worker counts as lost.", lower_bound=1
)
flags.DEFINE_integer("log_per_iterations", 200, "Log every N steps.", lower_bound=1)
flags.DEFINE_integer("save_per_iterations", 1000, "Save every N steps.", lower_bound=1)
flags.DEFINE(
    StepRange(),
    "profile_steps",
    None,
    "Record what TensorFlow does in these steps, first and last, for TensorBoard: 100,110.",
)
flags.DEFINE_integer("max_ckpts", 5, "Checkpoints to keep; a negative number keeps all.")
flags.DEFINE_integer(
    "epochs_between_evals",
    0,
    "Evaluate on the test images (with --holdout on those held out) every N epochs; 0: never.",
    lower_bound=0,
)
flags.DEFINE_float(
    "stop_threshold",
    None,
    "Stop once an evaluation reaches this accuracy.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_bool("eval_only", False, "Do not train: evaluate the newest checkpoint.")
flags.DEFINE_string(
    "export_dir", None, "New folder for a SavedModel of the last checkpoint, written at the end."
)
flags.DEFINE_bool("clean", False, "Delete the run in --ckpt_path and start over.")

command_line.refuse_infinite(
    *("train_epochs", "init_lr", "momentum", "weight_decay", "batch_norm_decay"),
    *("label_smoothing", "stop_threshold", "worker_timeout"),
)

FLAG_GROUPS = {
    "Data": ("path", *command_line.DATA_FLAGS, "use_synthetic_data", "holdout"),
    "Network": command_line.NETWORK_FLAGS,
    "Recipe": (
        *("recipe", "batch_size", "num_iterations", "train_epochs", "max_train_steps", "init_lr"),
        *("scale_lr", "optimizer", "momentum", "nesterov", "weight_decay", "batch_norm_decay"),
        *("label_smoothing", "cutout", "seed"),
    ),
    "Starting from a pretrained network": (
        *("pretrained_model_checkpoint_path", "fine_tune", "recompute_mean"),
    ),
    "Where things go": ("ckpt_path", "train_log_path", "export_dir", "clean"),
    "Saving and showing": (
        *("save_per_iterations", "max_ckpts", "log_per_iterations", "profile_steps"),
        *("quiet", "verbose"),
    ),
    "Evaluation": ("epochs_between_evals", "stop_threshold", "eval_only"),
    "Computing": ("device", "data_format", "dtype", "loss_scale", "jit_compile", "steps_per_call"),
    "Several devices and workers": (
        *("distribution_strategy", "num_gpus", "sync_batch_norm", "worker_timeout"),
    ),
}
# under the names of the dataclasses in config.py
RUN_FLAGS = (
    *command_line.DATA_FLAGS,
    *("recipe", "batch_size", "num_iterations", "optimizer", "init_lr", "scale_lr", "momentum"),
    *("nesterov", "weight_decay", "batch_norm_decay", "label_smoothing", "cutout", "seed"),
    *("holdout", "fine_tune", "recompute_mean"),
)
# what each of several workers may have of its own; and other names for flags that it may not
OWN_FLAGS = {
    *("path", "data_dir", "ckpt_path", "model_dir", "train_log_path", "export_dir"),
    *("resnet_size", "shortcut_connection"),
}


@flags.multi_flags_validator(
    ["num_iterations", "train_epochs"], "give --num_iterations or --train_epochs, not both"
)
def _one_length(values: dict[str, object]) -> bool:
    return None in values.values()


@flags.multi_flags_validator(
    ["stop_threshold", "epochs_between_evals"],
    "--stop_threshold needs evaluations: give --epochs_between_evals=1 too",
)
def _threshold_is_measured(values: dict[str, object]) -> bool:
    return values["stop_threshold"] is None or bool(values["epochs_between_evals"])


@flags.multi_flags_validator(
    ["export_dir", "eval_only"],
    "--export_dir is for the end of a training: the export command exports what is trained",
)
def _exports_what_it_trains(values: dict[str, object]) -> bool:
    return values["export_dir"] is None or not values["eval_only"]


@flags.multi_flags_validator(
    ["clean", "eval_only"], "--clean deletes what --eval_only is to evaluate: give one of them"
)
def _keeps_what_it_evaluates(values: dict[str, object]) -> bool:
    return not all(values.values())


@flags.multi_flags_validator(
    ["use_synthetic_data", "dataset", "coarse_labels"],
    "--use_synthetic_data is a data set of its own: leave out --dataset and --coarse_labels",
)
def _one_data_set(values: dict[str, object]) -> bool:
    return not values.pop("use_synthetic_data") or not any(values.values())


@flags.multi_flags_validator(
    ["num_gpus", "device"], "--device=cpu has no GPUs, and --device=gpu wants one or more"
)
def _gpus_fit_the_device(values: dict[str, object]) -> bool:
    return values["num_gpus"] is None or values["device"] != ("cpu", "gpu")[not values["num_gpus"]]


@exits_with_a_sentence
def main(argv: list[str]) -> int:
    if not FLAGS.pretrained_model_checkpoint_path:
        units_per_block(FLAGS.num_layers, FLAGS.bottleneck)  # told before TensorFlow is imported
    asked = "synthetic" if FLAGS.use_synthetic_data else FLAGS.dataset
    data = dataset.find_asked(FLAGS.path, asked)
    given = command_line.given_network() | command_line.given_flags(RUN_FLAGS)
    given["dataset"] = data and data.name
    ckpt_path = FLAGS.ckpt_path or _default_ckpt_path(data.name if data else "cifar10")
    log_path = FLAGS.train_log_path or os.path.join(ckpt_path, "log")
    for path in (ckpt_path, log_path):
        storage.refuse_patterns(path)

    workers = _workers()
    if FLAGS.export_dir and (workers is None or workers.index == 0):  # the chief
        storage.refuse_patterns(FLAGS.export_dir)
        storage.refuse_unwritable_folder(FLAGS.export_dir, apart_from=[ckpt_path, log_path])

    device = start_tensorflow(FLAGS.device, FLAGS.verbose, FLAGS.num_gpus)
    from cifar10_resnet.distributed import replicas as distributed
    from cifar10_resnet.serving import export
    from cifar10_resnet.training import loop, run_folder

    if workers and not FLAGS.quiet:
        print(f"Joining the others as {workers.name(workers.index)}.", flush=True)
    # before TensorFlow computes anything, as it wants it
    replicas = distributed.choose(FLAGS.distribution_strategy, workers, FLAGS.worker_timeout)
    if FLAGS.jit_compile and replicas.count > 1:
        raise UserError("--jit_compile is for one device: leave it out with several.")
    options = _options(ckpt_path, log_path, device)
    with replicas.ending_together(), contextlib.ExitStack() as held:
        replicas.refuse_differences(_flags_in_common())

        def prepare() -> str:
            held.enter_context(run_folder.lock(ckpt_path))
            return _prepare(options, data, given)

        if FLAGS.eval_only:
            report = replicas.from_chief(lambda: _evaluate(options, data, given))
            if replicas.is_chief:
                print(report)
            return 0
        run, resume_from = json.loads(replicas.from_chief(prepare))
        run = RunConfig.from_json(run)
        if FLAGS.verbose and replicas.is_chief:
            settings = run.settings() | dataclasses.asdict(options) | {"path": FLAGS.path}
            print(table(settings.items()))
        with command_line.quiet_work():
            outcome = loop.train(run, options, data, resume_from, replicas)
            if FLAGS.export_dir and replicas.is_chief and not outcome.stopped_by:
                # Not the layout that "auto" trained in: what is exported on a GPU runs anywhere.
                layout = "channels_last" if FLAGS.data_format == "auto" else FLAGS.data_format
                export.export_saved_model(outcome.checkpoint, FLAGS.export_dir, layout, FLAGS.dtype)
    if replicas.is_chief:
        _show(run, outcome)
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def _workers() -> cluster.Cluster | None:
    """Returns the workers that TF_CONFIG names, if they are to train together."""
    workers = None
    if FLAGS.distribution_strategy in ("auto", "multi_worker"):
        workers = cluster.from_environment()
    if FLAGS.distribution_strategy == "multi_worker" and workers is None:
        raise UserError(
            "--distribution_strategy=multi_worker needs TF_CONFIG to name the workers, as in "
            f"{cluster.EXAMPLE}: `{command('launch')}` sets it to try it on one machine."
        )
    return workers


def _options(ckpt_path: str, log_path: str, device: str) -> Options:
    """Returns what may change from one start of a run to the next."""
    return Options(
        ckpt_path=ckpt_path,
        train_log_path=log_path,
        data_format=resolve_data_format(FLAGS.data_format, FLAGS.dtype, device),
        dtype=FLAGS.dtype,
        loss_scale=FLAGS.loss_scale,
        jit_compile=FLAGS.jit_compile,
        sync_batch_norm=FLAGS.sync_batch_norm,
        steps_per_call=FLAGS.steps_per_call,
        log_per_iterations=FLAGS.log_per_iterations,
        save_per_iterations=FLAGS.save_per_iterations,
        max_ckpts=FLAGS.max_ckpts,
        epochs_between_evals=FLAGS.epochs_between_evals,
        stop_threshold=FLAGS.stop_threshold,
        max_train_steps=FLAGS.max_train_steps,
        profile_steps=FLAGS.profile_steps,
    )


def _evaluate(options: Options, data: dataset.Dataset | None, given: dict[str, object]) -> str:
    """Scores the run's newest checkpoint, and returns what to print of it."""
    from cifar10_resnet.evaluation import evaluator

    with command_line.quiet_work():
        scored = evaluator.score_newest(
            options.ckpt_path, data, options.data_format, options.dtype, given
        )
    return scored.line() if FLAGS.quiet else scored.report()


def _prepare(options: Options, data: dataset.Dataset | None, given: dict[str, object]) -> str:
    """Returns, as JSON, the run to train and its checkpoint to go on from, if there is one."""
    from cifar10_resnet.training import resume, run_folder

    pretrained = FLAGS.pretrained_model_checkpoint_path
    with command_line.quiet_work():
        run, resume_from = resume.prepare_run(
            *(given, None if FLAGS.clean else options.ckpt_path),
            *(data, FLAGS.train_epochs, pretrained),
        )
    if FLAGS.clean:  # now that nothing stands in the way of the new run
        run_folder.clean(options.ckpt_path, options.train_log_path, pretrained)
    return json.dumps([run.to_json(), resume_from])


def _show(run: RunConfig, outcome) -> None:
    """Prints how the run ended, and what to do next."""
    title = f"{run.model.name}, step {outcome.step} of {run.training.num_iterations}"
    rows = dict(outcome.summary)
    if outcome.stopped_by:
        name = signal.Signals(outcome.stopped_by).name
        again = "the same command without --clean" if FLAGS.clean else "the same command"
        rows["stopped"] = f"by {name}; {again} goes on from there"
    rows["evaluate"] = _evaluating(run, outcome.checkpoint)
    print(emphasised(title, sys.stdout))
    print(table(rows.items()))


def _flags_in_common() -> dict[str, object]:
    """The values of the flags that must be the same on all workers."""
    shared = FLAGS.get_key_flags_for_module(sys.modules[__name__])
    return {flag.name: flag.value for flag in shared if flag.name not in OWN_FLAGS}


def _evaluating(run: RunConfig, checkpoint: str) -> str:
    """Returns the command that evaluates a checkpoint."""
    words = [f"--ckpt_path={checkpoint}"]
    if run.data.dataset != "synthetic":
        given = command_line.given_flags(("path", "dataset"))
        words += [f"--{name}={value}" for name, value in given.items() if value is not None]
    if run.data.holdout:
        words.append("--split=holdout")
    return command("run_evaluator.py", *words)


def _default_ckpt_path(dataset_name: str) -> str:
    """Returns the run folder that a start without --ckpt_path has: one for each kind of run."""
    if FLAGS.pretrained_model_checkpoint_path:
        path = os.path.abspath(FLAGS.pretrained_model_checkpoint_path)
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        name, kind = os.path.basename(folder), "-transfer"
    else:
        network = ModelConfig(
            num_layers=FLAGS.num_layers,
            shortcut_connections=FLAGS.shortcut_connections,
            bottleneck=FLAGS.bottleneck,
            resnet_version=int(FLAGS.resnet_version),
        )
        name, kind = network.name, ""
    if FLAGS.fine_tune:
        kind = "-fine-tune"
    recipe = "" if FLAGS.recipe == "paper" else f"-{FLAGS.recipe}"
    data = "" if dataset_name == "cifar10" else f"-{dataset_name}"
    coarse = "-coarse" if FLAGS.coarse_labels else ""
    return os.path.join("runs", name + kind + recipe + data + coarse)


if __name__ == "__main__":
    app.run(main, FLAG_GROUPS)
