"""The parametrization: how a tensor scales, from form, role, optimizer family and alignment.

Pure and without torch. `forms` and `families` are data; `generator` combines them; `tensors`
applies the result to the shapes of a model. `priors` (batch size, duration) and `architecture`
(graphs of layers) multiply on top.
"""

from scaletune.rules.architecture import chain as chain
from scaletune.rules.architecture import in_degree as in_degree
from scaletune.rules.architecture import init_std as init_std
from scaletune.rules.architecture import maximal_lr as maximal_lr
from scaletune.rules.architecture import path_depths as path_depths
from scaletune.rules.families import FAMILIES as FAMILIES
from scaletune.rules.families import Family as Family
from scaletune.rules.families import shape_factor as shape_factor
from scaletune.rules.forms import FORMS as FORMS
from scaletune.rules.forms import Form as Form
from scaletune.rules.forms import Role as Role
from scaletune.rules.generator import ALIGNMENTS as ALIGNMENTS
from scaletune.rules.generator import ALPHAS as ALPHAS
from scaletune.rules.generator import DECAYS as DECAYS
from scaletune.rules.generator import ROLES as ROLES
from scaletune.rules.generator import Scale as Scale
from scaletune.rules.generator import caveats as caveats
from scaletune.rules.generator import depth as depth
from scaletune.rules.generator import scale as scale
from scaletune.rules.generator import weight_decay as weight_decay
from scaletune.rules.priors import PRIORS as PRIORS
from scaletune.rules.priors import Change as Change
from scaletune.rules.priors import TransferPrior as TransferPrior
from scaletune.rules.priors import batch_rule as batch_rule
from scaletune.rules.priors import betas as betas
from scaletune.rules.priors import power_lines_timescale as power_lines_timescale
from scaletune.rules.priors import prior as prior
from scaletune.rules.priors import replace_with_fit as replace_with_fit
from scaletune.rules.priors import timescale as timescale
from scaletune.rules.priors import timescale_weight_decay as timescale_weight_decay
from scaletune.rules.tensors import Tensor as Tensor
from scaletune.rules.tensors import TensorPlan as TensorPlan
from scaletune.rules.tensors import convert as convert
from scaletune.rules.tensors import plan as plan
from scaletune.rules.tensors import shift as shift
