"""Measures PyTorch's training step in the forms that are fast on a GPU, one line of JSON each.

python benchmarks/contenders/pytorch_gpu.py --layers=20 --dtype=bf16 --forms=eager,eager-graph

The images are already on the device, in channels_last. The optimizer is fused. No step waits for
the host: the loss is read at the end of a round. In fp32, convolutions and matrix products may use
TF32, as TensorFlow's do by default.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from contender import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, memory_batches
from pytorch import ResNet

# Each form is how the network computes, and whether a CUDA graph contains the whole step: forward,
# backward and optimizer. "reduce-overhead" has CUDA graphs of the forward and backward passes.
FORMS = {
    "eager": (None, False),
    "eager-graph": (None, True),
    "compile": ("default", False),
    "reduce-overhead": ("reduce-overhead", False),
    "compile-graph": ("default", True),
}
# These steps compile, choose kernels, and make the optimizer's buffers.
WARM_UP = 12
Step = Callable[[torch.Tensor, torch.Tensor], None]


class Loss(nn.Module):
    """A network with its loss, so both are compiled together."""

    def __init__(self, layers: int, dtype: str, device: str):
        super().__init__()
        self.network = ResNet(layers)
        # Each weight is used once in a step, so the cache of autocast would save nothing.
        self.autocast = torch.autocast(
            device, torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False
        )
        for norm in self.network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                # With a fixed momentum, nothing reads this counter. It would cost a kernel.
                norm.num_batches_tracked = None

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss and the number of correct predictions."""
        with self.autocast:
            logits = self.network(images)
        logits = logits.float()
        return F.cross_entropy(logits, labels), (logits.argmax(dim=1) == labels).sum()


class Training:
    """A network with its optimizer, its batches and one form of its training step."""

    def __init__(self, layers: int, dtype: str, form: str, batch_size: int, device: str):
        mode, self.is_graph = FORMS[form]
        self.is_marked = mode == "reduce-overhead" and device == "cuda"
        self.device, self.batch_size, self.done = device, batch_size, 0
        module = Loss(layers, dtype, device).to(device, memory_format=torch.channels_last)
        self.module = module.train()
        self.losses = torch.compile(self.module, mode=mode) if mode else self.module
        self.optimizer = self.make_optimizer()
        self.batches = [
            (self.to_device(torch.from_numpy(images)), torch.from_numpy(labels).long().to(device))
            for images, labels in memory_batches(batch_size)
        ]
        self.loss_sum = torch.zeros([], device=device)
        self.correct = torch.zeros([], dtype=torch.long, device=device)
        self.step: Step = self.take_step

    def make_optimizer(self) -> torch.optim.Optimizer:
        kernels = [p for p in self.module.parameters() if p.dim() > 1]
        others = [p for p in self.module.parameters() if p.dim() == 1]
        groups = [{"params": kernels, "weight_decay": WEIGHT_DECAY}, {"params": others}]
        return torch.optim.SGD(groups, LEARNING_RATE, MOMENTUM, fused=True)

    def to_device(self, images: torch.Tensor) -> torch.Tensor:
        images = images.permute(0, 3, 1, 2).to(self.device)
        return images.contiguous(memory_format=torch.channels_last)

    def take_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        if self.is_marked:
            # The graphs of the last step may now overwrite its outputs.
            torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad(set_to_none=True)
        loss, correct = self.losses(images, labels)
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach()
        self.correct += correct

    def warm_up(self) -> None:
        """Takes the first steps and, for that form, captures a step in a CUDA graph."""
        if not self.is_graph:
            self.train(WARM_UP)
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.train(WARM_UP)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.step = self.capture()
        self.train(WARM_UP)

    def capture(self) -> Step:
        """Returns a step that copies its batch to the place where a CUDA graph reads it."""
        place = tuple(tensor.clone() for tensor in self.batches[0])
        # Without gradients from before, the graph writes them instead of adding to them.
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.take_step(*place)

        def replay(images: torch.Tensor, labels: torch.Tensor) -> None:
            place[0].copy_(images)
            place[1].copy_(labels)
            graph.replay()

        return replay

    def train(self, count: int) -> float:
        """Takes `count` steps and, once they are done, returns their mean loss."""
        self.loss_sum.zero_()
        self.correct.zero_()
        for _ in range(count):
            self.step(*self.batches[self.done % len(self.batches)])
            self.done += 1
        return self.loss_sum.item() / count

    def rates(self, seconds: float, steps: int) -> list[float]:
        """Returns the images per second in rounds of `steps` steps, for at least `seconds`."""
        rates: list[float] = []
        began = time.perf_counter()
        while not rates or time.perf_counter() - began < seconds:
            started = time.perf_counter()
            loss = self.train(steps)
            rates.append(steps * self.batch_size / (time.perf_counter() - started))
            if loss != loss:
                raise FloatingPointError("the loss is no longer finite")
        return rates


def measure(form: str, flags: argparse.Namespace, device: str) -> dict[str, object]:
    """Returns the numbers of one form, or why there are none."""
    result: dict[str, object] = {"form": form}
    if FORMS[form][1] and device == "cpu":
        return result | {"problem": "skipped: CUDA graphs need a GPU"}
    began = time.perf_counter()
    try:
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        training = Training(flags.layers, flags.dtype, form, flags.batch_size, device)
        training.warm_up()
        result["startup_seconds"] = round(time.perf_counter() - began, 2)
        rates = training.rates(flags.seconds, flags.steps)
    # A form that fails must not stop the next one.
    except Exception as error:
        return result | {"problem": f"{type(error).__name__}: {error}"[:400]}
    if device == "cuda":
        result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return result | {
        "images_per_second": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "rounds": len(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"of {','.join(FORMS)}")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="steps in a round")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time of all rounds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU.")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for form in flags.forms.split(","):
        print(json.dumps(measure(form, flags, flags.device)), flush=True)


if __name__ == "__main__":
    main()
