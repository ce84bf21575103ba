"""Measures this project's bare step, and the step without some of its work, one line of JSON each.

python benchmarks/contenders/step_gpu.py --layers=20 --dtype=bf16 --forms=step,gradients

The batch is already on the device. All forms but "step" are a loop that XLA compiles as a whole.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import tensorflow as tf

from cifar10_resnet.config import ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.device import resolve_data_format, start_tensorflow
from cifar10_resnet.training.trainer import Trainer
from contender import memory_batches
from resnet_model import BatchNorm, ResNet, batch_norm_relu

Batch = tuple[tf.Tensor, tf.Tensor]
# A form takes a number of steps, and returns when they are done.
Form = Callable[[int], None]


class InMemory:
    """The batches of a trainer that takes the same one every time."""

    def take(self, count: int) -> Iterator[tuple[tf.Tensor, int, int]]:
        yield tf.zeros([1]), 0, count

    def __next__(self) -> None:
        return None

    get_next = __next__


class Step:
    """The forms of a step for one network."""

    def __init__(self, flags: argparse.Namespace, data_format: str):
        self.flags, self.data_format = flags, data_format
        images, labels = memory_batches(flags.batch_size)[0]
        self.batch = tf.constant(images), tf.constant(labels)

    def step(self) -> Form:
        """Returns the trainer's own steps."""
        trainer, batches = self._trainer(), InMemory()
        trainer.make_batch = lambda element: self.batch

        def take(count: int) -> None:
            trainer.train_steps(batches, count)
            trainer.steps_done  # noqa: B018 (waits until the step counter is known)

        return take

    def loop(self) -> Form:
        """Returns whole steps."""
        trainer = self._trainer()

        def work(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            trainer.train_step(images, labels)
            return tf.constant(0.0)

        return self._in_a_loop(work)

    def gradients(self, normalise: Callable = batch_norm_relu) -> Form:
        """Returns steps without the optimizer."""
        network = self._network(normalise)

        def work(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                loss = loss_of(network, images, labels)
            gradients = tape.gradient(
                loss, network.trainable_variables, unconnected_gradients="zero"
            )
            # Without any use of a gradient, XLA would not compute it.
            return tf.add_n([tf.reduce_sum(gradient) for gradient in gradients])

        return self._in_a_loop(work)

    def without_batch_norm(self) -> Form:
        """Returns steps without the optimizer and the batch norms."""
        return self.gradients(only_relu)

    def forward(self) -> Form:
        """Returns forward passes in training."""
        network = self._network(batch_norm_relu)
        return self._in_a_loop(lambda images, labels: loss_of(network, images, labels))

    def _trainer(self) -> Trainer:
        run = RunConfig(
            ModelConfig(num_layers=self.flags.layers),
            training=TrainingConfig(batch_size=self.flags.batch_size),
        )
        return Trainer(
            *(run, self.data_format, self.flags.dtype),
            jit_compile=self.flags.jit_compile,
            steps_per_call=self.flags.steps,
        )

    def _network(self, normalise: Callable) -> ResNet:
        how = {"data_format": self.data_format, "dtype": self.flags.dtype}
        return ResNet(num_layers=self.flags.layers, normalise=normalise, **how)

    def _in_a_loop(self, work: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> Form:
        """Returns steps of some work in a loop on the device."""
        images, labels = self.batch

        @tf.function(autograph=False, jit_compile=self.flags.jit_compile)
        def several(count: tf.Tensor) -> tf.Tensor:
            def one(done: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                # XLA would compute the same work only once, before the loop.
                changed = images + 1e-3 * tf.cast(done, tf.float32)
                return done + 1, total + work(changed, labels)

            start = (tf.constant(0), tf.constant(0.0))
            return tf.while_loop(lambda done, _: done < count, one, start)[1]

        return lambda count: several(tf.constant(count)).numpy()


def loss_of(network: ResNet, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    logits = network(images, training=True)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def only_relu(
    norm: BatchNorm,
    x: tf.Tensor,
    training: bool,
    shortcut: tf.Tensor | None = None,
    relu: bool = True,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Replaces `batch_norm_relu`, without the batch norm."""
    if shortcut is not None:
        x += shortcut
    return tf.nn.relu(x) if relu else x, x


FORMS = {
    "step": Step.step,
    "loop": Step.loop,
    "gradients": Step.gradients,
    "without-batch-norm": Step.without_batch_norm,
    "forward": Step.forward,
}


def measure(form: str, step: Step, flags: argparse.Namespace) -> dict[str, object]:
    """Returns the numbers of one form, or why there are none."""
    began = time.perf_counter()
    try:
        take = FORMS[form](step)
        take(flags.steps)
        startup, rates = time.perf_counter() - began, []
        began = time.perf_counter()
        while not rates or time.perf_counter() - began < flags.seconds:
            started = time.perf_counter()
            take(flags.steps)
            rates.append(flags.steps * flags.batch_size / (time.perf_counter() - started))
    # A form that fails must not stop the next one.
    except Exception as error:
        return {"form": form, "problem": f"{type(error).__name__}: {error}"[:400]}
    return {
        "form": form,
        "startup_seconds": round(startup, 2),
        "images_per_second": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "rounds": len(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), default="bf16")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"of {','.join(FORMS)}")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50, help="steps in a call")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time of all rounds")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    flags = parser.parse_args()
    device = start_tensorflow(flags.device)
    flags.jit_compile = device == "gpu"  # XLA is slower on CPUs.
    step = Step(flags, resolve_data_format("auto", flags.dtype, device))
    for form in flags.forms.split(","):
        print(json.dumps(measure(form, step, flags)), flush=True)


if __name__ == "__main__":
    main()
