"""Fits laws to runs.

`fit` fits a law and returns a `Fit`, `measure` finds the optimum of each setting, `compare`
compares a prediction with a measured optimum, and `compare_forms` ranks the functional forms of
the loss.
"""

from scaletune.fitting.cross_validation import compare as compare
from scaletune.fitting.fit import fit as fit
from scaletune.fitting.known_laws import LAWS as LAWS
from scaletune.fitting.known_laws import reads_every_row as reads_every_row
from scaletune.fitting.known_laws import require_known_law as require_known_law
from scaletune.fitting.loss.model_selection import compare_forms as compare_forms
from scaletune.fitting.optimum.measured_cells import measure as measure
from scaletune.fitting.relations import RELATIONS as RELATIONS
from scaletune.fitting.relations import fitted_relation as fitted_relation
from scaletune.fitting.relations import predict_relation as predict_relation
from scaletune.fitting.relations import select_group as select_group
