"""PyTorch as a contender, eager or compiled."""

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from contender import (
    BATCH_NORM_DECAY,
    BATCH_NORM_EPSILON,
    BATCH_SIZE,
    BLOCK_DEPTHS,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Contender,
    memory_batches,
    serve,
)

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def convolution(depth_in: int, depth: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(depth_in, depth, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def batch_norm(depth: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(depth, BATCH_NORM_EPSILON, 1 - BATCH_NORM_DECAY)


class Unit(nn.Module):
    def __init__(self, depth_in: int, depth: int, stride: int, first: bool):
        super().__init__()
        self.norm1, self.conv1 = batch_norm(depth_in), convolution(depth_in, depth, stride)
        self.norm2, self.conv2 = batch_norm(depth), convolution(depth, depth)
        self.stride, self.first, self.more = stride, first, (depth - depth_in) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.norm1(x))
        shortcut = activated if self.first else x
        if self.stride > 1:
            shortcut = F.avg_pool2d(shortcut, self.stride)
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.more, self.more))
        return self.conv2(F.relu(self.norm2(self.conv1(activated)))) + shortcut


class ResNet(nn.Module):
    def __init__(self, num_layers: int):
        super().__init__()
        depth_in = BLOCK_DEPTHS[0]
        self.init_conv = convolution(3, depth_in)
        blocks = OrderedDict()
        for block, depth in enumerate(BLOCK_DEPTHS, 1):
            units = OrderedDict()
            for unit in range(1, (num_layers - 2) // 6 + 1):
                stride = 2 if block > 1 and unit == 1 else 1
                units[f"unit{unit}"] = Unit(depth_in, depth, stride, first=block == unit == 1)
                depth_in = depth
            blocks[f"block{block}"] = nn.Sequential(units)
        self.blocks = nn.Sequential(blocks)
        self.final_norm = batch_norm(depth_in)
        self.logits = nn.Linear(depth_in, NUM_CLASSES)
        nn.init.kaiming_normal_(self.logits.weight, nonlinearity="relu")
        nn.init.zeros_(self.logits.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.final_norm(self.blocks(self.init_conv(images))))
        return self.logits(x.mean(dim=(2, 3)))


class Network:
    """A network in one memory format, with its optimizer and its batches."""

    def __init__(self, layers: int, dtype: str, compiled: bool, layout: str, weight_decay: float):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.benchmark = True
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=dtype == "bf16")
        self.layout = LAYOUTS[layout]
        self.module = ResNet(layers).to(self.device, memory_format=self.layout)
        self.forward = torch.compile(self.module) if compiled else self.module
        kernels = [p for p in self.module.parameters() if p.dim() > 1]
        others = [p for p in self.module.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.SGD(
            [{"params": kernels, "weight_decay": weight_decay}, {"params": others}],
            LEARNING_RATE,
            MOMENTUM,
            fused=True,
        )
        self.batches = [
            (self.images(images), torch.from_numpy(labels).long().to(self.device))
            for images, labels in memory_batches(BATCH_SIZE)
        ]
        self.done = 0

    def images(self, images: np.ndarray) -> torch.Tensor:
        planes = torch.from_numpy(images).permute(0, 3, 1, 2)
        return planes.to(self.device).contiguous(memory_format=self.layout)

    def train(self, count: int) -> float:
        self.module.train()
        loss_sum = torch.zeros([], device=self.device)
        correct = torch.zeros([], dtype=torch.long, device=self.device)
        for _ in range(count):
            images, labels = self.batches[self.done % len(self.batches)]
            with self.autocast:
                logits = self.forward(images)
            loss = F.cross_entropy(logits.float(), labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.detach()
            correct += (logits.argmax(dim=1) == labels).sum()
            self.done += 1
        return loss_sum.item() / count

    def fastest_step(self) -> float:
        self.train(3)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            self.train(1)
            times.append(time.perf_counter() - started)
        return min(times)


class PyTorch(Contender):
    def prepare(
        self,
        layers: int,
        dtype: str,
        compiled: bool,
        weight_decay: float = WEIGHT_DECAY,
    ) -> dict[str, Any]:
        # The faster layout depends on processor, precision and compiler, so both are tried.
        # The network of 20 layers has the layers of all depths, and compiles in less time.
        seconds = {
            layout: Network(20, dtype, compiled, layout, weight_decay).fastest_step()
            for layout in LAYOUTS
        }
        layout = min(seconds, key=seconds.get)
        torch.compiler.reset()
        self.network = Network(layers, dtype, compiled, layout, weight_decay)
        return {
            "parameters": sum(p.numel() for p in self.network.module.parameters()),
            "device": "gpu" if self.network.device == "cuda" else "cpu",
            "layout": layout,
            "resnet20_step_seconds": seconds,
            "threads": torch.get_num_threads(),
        }

    def train(self, count: int) -> float:
        return self.network.train(count)

    # If a convolution halves the image, TensorFlow's "SAME" pads after it, and PyTorch's padding=1
    # in effect before it. So this network is the same function of images and kernels that are
    # mirrored both ways. Everything else in it is symmetric.

    def load(self, variables: Mapping[str, np.ndarray]) -> None:
        attributes = {
            **{"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"},
            **{"moving_mean": "running_mean", "moving_variance": "running_var"},
        }
        for name, value in variables.items():
            path, _, attribute = name.replace("/", ".").rpartition(".")
            module = self.network.module.get_submodule(
                f"blocks.{path}" if path.startswith("block") else path
            )
            if value.ndim == 4:
                value = value[::-1, ::-1].transpose(3, 2, 0, 1)
            elif value.ndim == 2:
                value = value.T
            with torch.no_grad():
                tensor = torch.from_numpy(np.ascontiguousarray(value))
                getattr(module, attributes[attribute]).copy_(tensor)
        self.network.batches = [(x.flip(2, 3), labels) for x, labels in self.network.batches]

    def logits(self, images: np.ndarray) -> np.ndarray:
        mirrored = np.ascontiguousarray(images[:, ::-1, ::-1])
        self.network.module.eval()
        with torch.no_grad(), self.network.autocast:
            return self.network.forward(self.network.images(mirrored)).float().cpu().numpy()


if __name__ == "__main__":
    serve(PyTorch().commands())
