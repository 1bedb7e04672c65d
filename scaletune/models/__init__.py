"""The built-in models. Each parameter has a leading trial axis K; K = 1 is the ordinary model."""

from scaletune.models.build import build, plain_state
from scaletune.models.mlp import MLP
from scaletune.models.moe import MoE
from scaletune.models.resnet import ResNet
from scaletune.models.transformer import Transformer
from scaletune.models.vit import ViT

ZOO = (Transformer, MoE, MLP, ResNet, ViT)

__all__ = ["MLP", "ZOO", "MoE", "ResNet", "Transformer", "ViT", "build", "plain_state"]
