"""The residual network of basic blocks (arXiv:1512.03385) with GroupNorm in place of BatchNorm, whose running statistics no trial shares.

Trials are groups of channels: x is [B, K * channels, H, W] between stem and readout.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from scaletune import zoo
from scaletune.models.blocks import Multipliers
from scaletune.models.layers import Conv, GroupNorm, Linear, mean_nats


class NormedConv(nn.Module):
    """A convolution that keeps the image's size, or divides it by `stride`, and its norm."""

    def __init__(
        self, stack: int, model: zoo.ResNet, name: str, multipliers: Multipliers, fan_in: int, fan_out: int,
        *, side: int = 3, stride: int = 1, shared: bool = False,
    ):  # fmt: skip
        super().__init__()
        multiplier = multipliers[f"{name}.convolution.weight"]
        self.convolution = Conv(
            stack,
            fan_in,
            fan_out,
            side,
            multiplier,
            stride=stride,
            padding=side // 2,
            shared=shared,
        )
        self.normalization = GroupNorm(stack, fan_out, model.groups, model.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalization(self.convolution(x))


class Block(nn.Module):
    """relu(shortcut(x) + a * conv(relu(conv(x)))), a the residual multiplier; the shortcut is a convolution where the shape changes."""

    def __init__(
        self,
        stack: int,
        model: zoo.ResNet,
        name: str,
        multipliers: Multipliers,
        fan_in: int,
        fan_out: int,
    ):
        super().__init__()
        stride, self.residual = 1 if fan_in == fan_out else 2, multipliers["residual"]
        shape = (stack, model, f"{name}.shortcut", multipliers, fan_in, fan_out)
        self.shortcut = NormedConv(*shape, side=1, stride=stride) if stride == 2 else nn.Identity()
        self.layer = nn.ModuleList(
            [
                NormedConv(
                    stack, model, f"{name}.layer.0", multipliers, fan_in, fan_out, stride=stride
                ),
                NormedConv(stack, model, f"{name}.layer.1", multipliers, fan_out, fan_out),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer
        return F.relu(self.shortcut(x) + self.residual * second(F.relu(first(x))))


class Stage(nn.Module):
    """Blocks at one image size."""

    def __init__(self, stack: int, model: zoo.ResNet, stage: int, multipliers: Multipliers):
        super().__init__()
        size = model.width * 2**stage
        fans = [size // 2 if stage else size] + [size] * (model.depth - 1)
        names = [f"stages.{stage}.layers.{i}" for i in range(model.depth)]
        self.layers = nn.ModuleList(
            Block(stack, model, name, multipliers, fan_in, size)
            for name, fan_in in zip(names, fans, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for block in self.layers:
            found.append(block(found[-1]))
        return found[1:]


class ResNet(nn.Module):
    """images [B, channels, H, W] -> logits [K, B, V]; with classes [B] -> mean nats per image of each trial, [K]."""

    def __init__(self, model: zoo.ResNet, classes: int, multipliers: Multipliers, stack: int = 1):
        super().__init__()
        self.stack, last = stack, model.width * 2 ** (model.stages - 1)
        self.embedder = NormedConv(
            stack, model, "embedder", multipliers, model.channels, model.width, shared=True
        )
        self.stages = nn.ModuleList(
            Stage(stack, model, stage, multipliers) for stage in range(model.stages)
        )
        multiplier = multipliers["classifier.weight"]
        self.classifier: Linear | Conv = (
            Linear(stack, last, classes, multiplier, bias=True)
            if model.readout == "linear"
            else Conv(stack, last, classes, 1, multiplier, bias=True)
        )

    @property
    def readout(self) -> Linear | Conv:
        """The last layer."""
        return self.classifier

    def hidden(self, images: Tensor) -> list[Tensor]:
        """The stream after the stem and after each block: [B, K * channels, H, W] each."""
        stream = [F.relu(self.embedder(images))]
        for stage in self.stages:
            stream += stage(stream[-1])
        return stream

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self._read(self.hidden(images)[-1])
        return logits if targets is None else mean_nats(logits, targets)

    def _read(self, x: Tensor) -> Tensor:
        """The average over places, read out, or the average of what is read out in each: [K, B, V]."""
        if isinstance(self.classifier, Linear):
            return self.classifier(
                x.mean((2, 3)).view(len(x), self.stack, -1).transpose(0, 1).contiguous()
            )
        return (
            self.classifier(x)
            .mean((2, 3))
            .view(len(x), self.stack, -1)
            .transpose(0, 1)
            .contiguous()
        )
