"""Networks of the pruning literature as torch modules: layers and names only, no weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class MLPNet(nn.Module):
    """784-40-20-10 multilayer perceptron with ReLU and no biases; 32,360 weights. Inputs (m, 784) or (m, …)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (m, 10)."""
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.fc3(functional.relu(self.fc2(x)))  # type: ignore[no-any-return]


class CIFARNet(nn.Module):
    """Three 5×5 convolutions (32, 32, 64 channels) and two linear layers, with biases. Inputs (m, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(576, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (m, 10)."""
        x = functional.relu(functional.max_pool2d(self.conv1(x), 3, 2))
        x = functional.avg_pool2d(functional.relu(self.conv2(x)), 3, 2)
        x = functional.avg_pool2d(functional.relu(self.conv3(x)), 3, 2)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm around a shortcut; a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """One residual step."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet20(nn.Module):
    """ResNet20 for CIFAR-10 (He et al., 2016), 16, 32 and 64 channels. Inputs (m, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1)
        self.layer2 = _stage(16, 32, 2)
        self.layer3 = _stage(32, 64, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (m, 10)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1), BasicBlock(outputs, outputs, 1)
    )


class SeparableConvolution(nn.Module):
    """A 3×3 depthwise and a 1×1 pointwise convolution, each with batch norm and ReLU6."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.dw = nn.Conv2d(inputs, inputs, 3, stride, groups=inputs, bias=False)
        self.dw_bn = nn.BatchNorm2d(inputs, eps=1e-3)
        self.pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pw_bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Mix within channels, then across them."""
        x = functional.relu6(self.dw_bn(self.dw(_pad_same(x, self.stride))))
        return functional.relu6(self.pw_bn(self.pw(x)))


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al., 2017) with TensorFlow's "same" padding. Inputs (m, 3, 224, 224).

    Parameters
    ----------
    width : float
        Multiplier of the channels.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = [int(width * c) for c in (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)]
        strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
        self.conv1 = nn.Conv2d(3, channels[0], 3, 2, bias=False)
        self.conv1_bn = nn.BatchNorm2d(channels[0], eps=1e-3)
        self.blocks = nn.Sequential(
            *(SeparableConvolution(*step) for step in zip(channels[:-1], channels[1:], strides, strict=True))
        )
        self.fc = nn.Linear(channels[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (m, 1000)."""
        x = functional.relu6(self.conv1_bn(self.conv1(_pad_same(x, 2))))
        return self.fc(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]


def _pad_same(x: Tensor, stride: int) -> Tensor:
    """Pad for a 3×3 convolution as TensorFlow's "same" does: an odd pixel goes to the right and the bottom."""
    margins: list[int] = []
    for length in (x.shape[-1], x.shape[-2]):
        total = max((-(-length // stride) - 1) * stride + 3 - length, 0)
        margins += [total // 2, total - total // 2]
    return functional.pad(x, margins)
