"""Other fitted relations of the field, each a `Relation` between columns of a table.

`scaletune.fitting.fit(table, law=ID)` fits any of `RELATIONS`.
"""

from collections.abc import Mapping

from scaletune.fitting.relations import (
    critical,
    curves,
    downstream,
    isoflop,
    repetition,
    schedule,
    trajectory,
)
from scaletune.fitting.relations.fit import fit_relation as fit_relation
from scaletune.fitting.relations.prediction import fitted_relation as fitted_relation
from scaletune.fitting.relations.prediction import predict_relation as predict_relation
from scaletune.fitting.relations.prediction import select_group as select_group
from scaletune.fitting.relations.relation import Relation as Relation

RELATIONS: Mapping[str, Relation] = {
    **critical.RELATIONS,
    **trajectory.RELATIONS,
    **downstream.RELATIONS,
    **repetition.RELATIONS,
    **schedule.RELATIONS,
    **curves.RELATIONS,
    **isoflop.RELATIONS,
}
