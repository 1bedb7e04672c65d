"""The residual network of basic blocks (arXiv:1512.03385), with GroupNorm instead of BatchNorm.

The trials of a stack could not share BatchNorm's running statistics.

Shapes:
    K trials, B images of height H and width W, V classes
    images: [B, channels, H, W]; between stem and readout x: [B, K * channels, H, W], because trials
    are groups of channels; logits: [K, B, V]
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from scaletune import zoo
from scaletune.models.blocks import Multipliers
from scaletune.models.layers import Conv, GroupNorm, Linear, mean_cross_entropy


class NormedConv(nn.Module):
    """norm(conv(x)). The convolution divides height and width by `stride`."""

    def __init__(
        self,
        stack: int,
        config: zoo.ResNetConfig,
        name: str,
        multipliers: Multipliers,
        fan_in: int,
        fan_out: int,
        *,
        side: int = 3,
        stride: int = 1,
        shared: bool = False,
    ):
        super().__init__()
        multiplier, padding = multipliers[f"{name}.convolution.weight"], side // 2
        self.convolution = Conv(
            stack, fan_in, fan_out, side, multiplier, stride=stride, padding=padding, shared=shared
        )
        self.normalization = GroupNorm(stack, fan_out, config.groups, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalization(self.convolution(x))


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + a * conv(relu(conv(x)))); a is the residual multiplier.

    The shortcut is the identity, or a 1x1 convolution if the shape changes.
    """

    def __init__(
        self,
        stack: int,
        config: zoo.ResNetConfig,
        name: str,
        multipliers: Multipliers,
        fan_in: int,
        fan_out: int,
    ):
        super().__init__()
        self.residual = multipliers["residual"]

        def conv(part: str, fan_in: int, side: int = 3, stride: int = 1) -> NormedConv:
            shape = (stack, config, f"{name}.{part}", multipliers, fan_in, fan_out)
            return NormedConv(*shape, side=side, stride=stride)

        stride = 1 if fan_in == fan_out else 2
        self.shortcut = conv("shortcut", fan_in, side=1, stride=2) if stride == 2 else nn.Identity()
        self.layer = nn.ModuleList(
            [conv("layer.0", fan_in, stride=stride), conv("layer.1", fan_out)]
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer
        return F.relu(self.shortcut(x) + self.residual * second(F.relu(first(x))))


class Stage(nn.Module):
    """The blocks of one image size."""

    def __init__(self, stack: int, config: zoo.ResNetConfig, stage: int, multipliers: Multipliers):
        super().__init__()
        channels = config.width * 2**stage
        fan_ins = [channels // 2 if stage else channels] + [channels] * (config.depth - 1)
        names = [f"stages.{stage}.layers.{i}" for i in range(config.depth)]
        self.layers = nn.ModuleList(
            ResidualBlock(stack, config, name, multipliers, fan_in, channels)
            for name, fan_in in zip(names, fan_ins, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The output of each block."""
        stream = [x]
        for block in self.layers:
            stream.append(block(stream[-1]))
        return stream[1:]


class ResNet(nn.Module):
    """images -> logits; with classes [B] -> the mean loss of each trial in nats per image, [K]."""

    def __init__(
        self, config: zoo.ResNetConfig, classes: int, multipliers: Multipliers, stack: int = 1
    ):
        super().__init__()
        self.stack, channels = stack, config.width * 2 ** (config.stages - 1)
        self.embedder = NormedConv(
            stack, config, "embedder", multipliers, config.channels, config.width, shared=True
        )
        self.stages = nn.ModuleList(
            Stage(stack, config, stage, multipliers) for stage in range(config.stages)
        )
        multiplier = multipliers["classifier.weight"]
        self.classifier: Linear | Conv = (
            Linear(stack, channels, classes, multiplier, bias=True)
            if config.readout == "linear"
            else Conv(stack, channels, classes, 1, multiplier, bias=True)
        )

    @property
    def readout(self) -> Linear | Conv:
        """The last layer."""
        return self.classifier

    def hidden(self, images: Tensor) -> list[Tensor]:
        """The stream after the stem and after each block, [B, K * channels, H, W] each."""
        stream = [F.relu(self.embedder(images))]
        for stage in self.stages:
            stream += stage(stream[-1])
        return stream

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self._classify(self.hidden(images)[-1])
        return logits if targets is None else mean_cross_entropy(logits, targets)

    def _classify(self, x: Tensor) -> Tensor:
        """[B, K * channels, H, W] -> [K, B, V].

        A linear readout of the mean over positions, or the mean of a 1x1 convolution.
        """
        if isinstance(self.classifier, Linear):
            return self.classifier(self._split_trials(x.mean((2, 3))))
        return self._split_trials(self.classifier(x).mean((2, 3)))

    def _split_trials(self, x: Tensor) -> Tensor:
        """[B, K * n] -> [K, B, n]."""
        return x.view(len(x), self.stack, -1).transpose(0, 1).contiguous()
