"""The user's own `nn.Module` as the model of a recipe: `model.build`.

`source` finds the function or the Hugging Face config, `arguments` decides what the function is
called with, `hf` builds a model of transformers, `build` builds the module of a point, and
`wrapper` computes its loss.
"""

from scaletune.models.own.arguments import own_config as own_config
from scaletune.models.own.arguments import stated_vocab_size as stated_vocab_size
from scaletune.models.own.build import OwnSize as OwnSize
from scaletune.models.own.build import build_module as build_module
from scaletune.models.own.build import built_size as built_size
from scaletune.models.own.build import import_folders as import_folders
from scaletune.models.own.wrapper import OwnModel as OwnModel
from scaletune.models.own.wrapper import check_output as check_output
from scaletune.models.own.wrapper import own_draws as own_draws
