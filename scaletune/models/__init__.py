"""The zoo: models whose every parameter carries a leading trial axis K; K = 1 is the ordinary model."""

from scaletune.models.transformer import Transformer, build, plain_state

__all__ = ["Transformer", "build", "plain_state"]
