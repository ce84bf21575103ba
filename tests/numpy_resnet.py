"""The network again: a reference in NumPy and float64 that shares no code with the product.

It is slow and plain on purpose. Images are NHWC, and variables are a dict of values by name. The
shapes of the values define the network's depths.
"""

import numpy as np

Values = dict[str, np.ndarray]


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """TensorFlow's SAME convolution: as many results as places a stride apart, zeros around.

    An odd number of padded rows has the larger half at the end. So a 3x3 kernel of stride 2 on an
    even size is padded below and on the right only.
    """
    size = kernel.shape[0]
    padding = []
    for length in x.shape[1:3]:
        results = -(-length // stride)
        missing = max((results - 1) * stride + size - length, 0)
        padding.append((missing // 2, missing - missing // 2))
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    # im2col: [N, H, W, depth in, size, size], then every stride-th place
    patches = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    patches = patches[:, ::stride, ::stride]
    return np.tensordot(patches, kernel, axes=([4, 5, 3], [0, 1, 2]))


def average_pool(x: np.ndarray, stride: int) -> np.ndarray:
    """Means of squares that do not overlap and tile the image."""
    n, height, width, depth = x.shape
    x = x.reshape(n, height // stride, stride, width // stride, stride, depth)
    return x.mean(axis=(2, 4))


def deepen(x: np.ndarray, depth: int) -> np.ndarray:
    """Zeros as further channels, as many before as behind."""
    missing = depth - x.shape[-1]
    padded = np.zeros((*x.shape[:-1], depth))
    padded[..., missing // 2 : missing // 2 + x.shape[-1]] = x
    return padded


class NumpyResNet:
    """One forward pass.

    Afterwards, `statistics` has the mean and variance that each batch norm saw (the unbiased
    variance, which moving averages take; normalising takes the biased one), and `nearest_kink` is
    how near to zero any ReLU's input came: gradients on its two sides have nothing in common.
    """

    def __init__(
        self,
        values: Values,
        version: int = 2,
        shortcuts: bool = True,
        epsilon: float = 1e-3,
        training: bool = True,
    ):
        self.values = {name: np.asarray(value, np.float64) for name, value in values.items()}
        self.version, self.shortcuts = version, shortcuts
        self.epsilon, self.training = epsilon, training
        self.statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.nearest_kink = np.inf

    def relu(self, x: np.ndarray) -> np.ndarray:
        self.nearest_kink = min(self.nearest_kink, np.abs(x).min())
        return np.maximum(x, 0.0)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        if self.training:
            mean = x.mean(axis=(0, 1, 2))
            variance = ((x - mean) ** 2).mean(axis=(0, 1, 2))
            count = x.size // x.shape[-1]
            self.statistics[name] = mean, variance * count / (count - 1)
        else:
            mean = self.values[f"{name}/moving_mean"]
            variance = self.values[f"{name}/moving_variance"]
        normalised = (x - mean) / np.sqrt(variance + self.epsilon)
        return normalised * self.values[f"{name}/gamma"] + self.values[f"{name}/beta"]

    def unit(self, x: np.ndarray, name: str, stride: int = 1, first: bool = False) -> np.ndarray:
        """One unit; `first` is the network's first, whose shortcut starts where its branch does."""
        kernels = []
        while (key := f"{name}/conv{len(kernels) + 1}/kernel") in self.values:
            kernels.append(self.values[key])
        # the first 3x3 convolution is the one that strides
        sizes = [kernel.shape[0] for kernel in kernels]
        strides = [stride if i == sizes.index(3) else 1 for i in range(len(kernels))]

        shortcut = branch = x
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True), 1):
            if self.version == 2:
                branch = self.relu(self.norm(branch, f"{name}/norm{i}"))
                if first and i == 1:
                    shortcut = branch
                branch = convolve(branch, kernel, step)
            else:
                branch = self.norm(convolve(branch, kernel, step), f"{name}/norm{i}")
                if i < len(kernels):
                    branch = self.relu(branch)
        if self.shortcuts:
            branch = branch + deepen(average_pool(shortcut, stride), branch.shape[-1])
        return self.relu(branch) if self.version == 1 else branch

    def logits(self, images: np.ndarray, units: int) -> np.ndarray:
        """Returns the logits of images, through three blocks of units."""
        x = convolve(np.asarray(images, np.float64), self.values["init_conv/kernel"], 1)
        if self.version == 1:
            x = self.relu(self.norm(x, "init_norm"))
        for block in (1, 2, 3):
            for unit in range(1, units + 1):
                x = self.unit(
                    x,
                    f"block{block}/unit{unit}",
                    stride=2 if block > 1 and unit == 1 else 1,
                    first=block == unit == 1,
                )
        if self.version == 2:
            x = self.relu(self.norm(x, "final_norm"))
        return x.mean(axis=(1, 2)) @ self.values["logits/kernel"] + self.values["logits/bias"]
