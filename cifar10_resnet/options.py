"""Defines once the settings that may change each time a run starts: files, logging, devices.

The flags, their checks and docs/flags.md follow from the fields here.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cifar10_resnet.config import RunConfig, of_data, of_pretrained, of_recipe
from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import FORMATS
from cifar10_resnet.settings import Checked, setting

of_files = partial(setting, group="Files and folders")
of_logging = partial(setting, group="Logging")
of_evaluation = partial(setting, group="Evaluation")
of_device = partial(setting, group="Device and precision")
of_several = partial(setting, group="Several devices and workers")
# This makes a setting for the checkpoint that a program reads.
checkpoint = partial(
    setting, help="Checkpoint, or a folder (its newest checkpoint is used)", also=("model_dir",)
)
# These make the settings for the SavedModel that a program reads.
saved_model = partial(setting, help="Folder that the export command wrote", group="Network")
trust = partial(
    setting, False, "Load any SavedModel, even if it can read and write files", "Network"
)

# By device: steps in a call from Python, steps from save to save, and the most from log to log.
# A GPU takes 500 steps a second, and each call, save or log interrupts it.
STEPS_PER_CALL = {"cpu": 1, "gpu": 100}
STEPS_PER_SAVE = {"cpu": 1000, "gpu": 10_000}
MOST_STEPS_PER_LOG = {"cpu": 200, "gpu": 1000}
# Without --log_per_iterations, learning curves have enough points however short the run is.
LEAST_LOGS = 20


@dataclass(frozen=True)
class Options(Checked):
    """The settings that may change each time a run starts or resumes."""

    path: str | None = of_data(
        None,
        "Folder with the data files, or its parent folder",
        first=True,
        also=("data_dir", "data_path"),
        shown=" or ".join(known.folder for known in FORMATS.values() if known.folder),
        own=True,
    )
    use_synthetic_data: bool = of_data(False, "Train on synthetic images (no --path needed)")
    train_epochs: float | None = of_recipe(
        None, "Length in epochs, instead of --num_iterations", above=0
    )
    max_train_steps: int | None = of_recipe(
        None, "Stop after this step without changing the schedule", least=1
    )
    pretrained_model_checkpoint_path: str | None = of_pretrained(
        None, "Start from this checkpoint's network, except the final layer", first=True
    )
    ckpt_path: str | None = of_files(
        None,
        "Run folder for checkpoints and logs",
        also=("model_dir",),
        shown="runs/resnet20, runs/resnet20-fast and so on",
        own=True,
    )
    train_log_path: str | None = of_files(
        None, "TensorBoard folder", also=("log_path",), shown="log in --ckpt_path", own=True
    )
    export_dir: str | None = of_files(
        None, "Write a SavedModel to this new folder at the end", own=True
    )
    clean: bool = of_files(False, "Delete the run in --ckpt_path and start again")
    save_per_iterations: int | None = of_logging(
        None,
        "Save a checkpoint every N steps",
        least=1,
        shown="{cpu}, on GPUs {gpu}".format(**STEPS_PER_SAVE),
    )
    max_ckpts: int = of_logging(5, "Number of newest checkpoints to keep (negative: all)")
    log_per_iterations: int | None = of_logging(
        None,
        "Log every N steps",
        also=("log_per_steps",),
        least=1,
        shown="{cpu}, on GPUs {gpu}, ".format(**MOST_STEPS_PER_LOG)
        + f"or less for at least {LEAST_LOGS} logs",
    )
    profile_steps: tuple[int, int] | None = of_logging(
        None,
        "Profile these steps for TensorBoard: FIRST,LAST",
        meaning="a first and a last step, as in 100,110",
        least=1,
    )
    quiet: bool = of_logging(False, "Print only errors and the result")
    verbose: bool = of_logging(False, "Print all settings and TensorFlow's messages")
    epochs_between_evals: int = of_evaluation(
        0, "Evaluate every N epochs, on the holdout if there is one", least=0
    )
    stop_threshold: float | None = of_evaluation(
        None,
        "Stop when an evaluation reaches this accuracy, a fraction such as 0.92",
        above=0,
        most=1,
    )
    eval_only: bool = of_evaluation(False, "Evaluate the newest checkpoint without training")
    device: str = of_device(
        "auto",
        "Device to use (auto: a GPU if TensorFlow finds one)",
        choices=("auto", "cpu", "gpu"),
    )
    data_format: str = of_device(
        "auto",
        "Data format inside the network (auto: channels_first only on GPUs)",
        choices=("auto", "channels_first", "channels_last"),
    )
    deterministic: str = of_device(
        "off",
        "Bit-identical runs (ops: deterministic operations, strict: on the same machine only)",
        choices=("off", "ops", "strict"),
    )
    tf32: bool = of_device(
        True, "Compute fp32 on recent NVIDIA GPUs in TF32 (10-bit mantissa, faster)"
    )
    dtype: str = of_device(
        "fp32",
        "Precision of the computation (variables stay fp32)",
        choices=("fp32", "bf16", "fp16"),
    )
    loss_scale: float | str = of_device(
        128.0,
        "Factor on the loss against fp16 underflow (dynamic: adapts to the gradients)",
        least=1,
        words=("dynamic",),
        meaning="a number of 1 or more, or dynamic",
    )
    native: str = of_device(
        "auto",
        "Native kernels for CPUs (auto: if they can be built; on: required)",
        choices=("auto", "on", "off"),
    )
    jit_compile: bool | None = of_device(
        None, "Compile the steps with XLA (slower on CPUs)", shown="on one GPU"
    )
    steps_per_call: int | None = of_device(
        None,
        "Steps per call from Python",
        least=1,
        shown="{cpu}, on GPUs {gpu}".format(**STEPS_PER_CALL),
    )
    distribution_strategy: str = of_several(
        "auto",
        "Devices to use: all workers in TF_CONFIG, all local GPUs, or one",
        choices=("auto", "off", "mirrored", "multi_worker"),
        elsewhere=dict.fromkeys(
            ("worker_hosts", "task_index"),
            "Set TF_CONFIG to the list of workers instead: see docs/distributed.md.",
        ),
    )
    num_gpus: int | None = of_several(None, "Number of local GPUs to use", least=0, shown="all")
    sync_batch_norm: bool = of_several(
        False, "Compute batch-norm statistics over the whole batch, not per replica"
    )
    worker_timeout: float = of_several(
        60.0, "Seconds of silence before a worker counts as lost", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for is_wrong, why in (
            (self.quiet and self.verbose, "--quiet and --verbose contradict. Use one of them."),
            (
                self.stop_threshold is not None and not self.epochs_between_evals,
                "--stop_threshold needs evaluations. Add --epochs_between_evals=1.",
            ),
            (
                self.export_dir is not None and self.eval_only,
                "--export_dir does not work with --eval_only. Use the export command.",
            ),
            (
                self.clean and self.eval_only,
                "--clean would delete the checkpoint that --eval_only evaluates. Remove one of "
                "them.",
            ),
            (
                self.num_gpus is not None
                and self.device == ("gpu" if self.num_gpus == 0 else "cpu"),
                "--num_gpus does not fit --device. Use --num_gpus=1 or more with gpu, 0 with cpu.",
            ),
        ):
            if is_wrong:
                raise UserError(why)

    def refuse_beside(self, given: dict[str, Any]) -> None:
        """Refuses given settings that --train_epochs or --use_synthetic_data replaces."""
        if self.train_epochs is not None and given.get("num_iterations") is not None:
            raise UserError(
                "--num_iterations and --train_epochs both set the length. Use one of them."
            )
        if self.use_synthetic_data and (given.get("dataset") or given.get("coarse_labels")):
            raise UserError(
                "--use_synthetic_data does not work with --dataset or --coarse_labels. Remove them."
            )

    def settled(self, device: str, data_format: str, num_replicas: int) -> "Options":
        """Returns the options for "cpu" or "gpu", with a value in place of each "auto"."""
        if self.jit_compile and num_replicas > 1:
            raise UserError(
                "--jit_compile works on one device only. Remove it, or use --num_gpus=1."
            )
        jit_compile = self.jit_compile
        if jit_compile is None:
            jit_compile = device == "gpu" and num_replicas == 1
        return replace(
            self,
            device=device,
            data_format=data_format,
            jit_compile=jit_compile,
            steps_per_call=self.steps_per_call or STEPS_PER_CALL[device],
            save_per_iterations=self.save_per_iterations or STEPS_PER_SAVE[device],
        )

    def last_step(self, run: RunConfig) -> int:
        """Returns the step at which this start of a run ends."""
        return min(run.training.num_iterations, self.max_train_steps or run.training.num_iterations)

    def steps_per_log(self, run: RunConfig) -> int:
        """Returns the number of steps from one log of a run to the next."""
        enough = max(1, self.last_step(run) // LEAST_LOGS)
        most = MOST_STEPS_PER_LOG["gpu" if self.device == "gpu" else "cpu"]
        return self.log_per_iterations or min(enough, most)
