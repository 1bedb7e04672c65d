"""Laws fitted to runs: `fit` gives a `Fit`, `measure` the optimum of each cell, `compare` a prediction against one."""

from scaletune.fitting.cross_validation import compare as compare
from scaletune.fitting.fit import LAWS as LAWS
from scaletune.fitting.fit import fit as fit
from scaletune.fitting.fit import known_law as known_law
from scaletune.fitting.fit import measure as measure
from scaletune.fitting.loss.model_selection import compare_forms as compare_forms
from scaletune.fitting.relations import RELATIONS as RELATIONS
from scaletune.fitting.relations import of_group as of_group
from scaletune.fitting.relations import predict_relation as predict_relation
from scaletune.fitting.relations import solved_relation as solved_relation
