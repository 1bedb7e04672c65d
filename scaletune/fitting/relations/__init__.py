"""What else the field fits, each as one `Relation` between columns: `fit(table, law=ID)` for any of `RELATIONS`."""

from collections.abc import Mapping

from scaletune.fitting.relations import (
    critical,
    curves,
    downstream,
    repetition,
    schedule,
    trajectory,
)
from scaletune.fitting.relations.relation import Relation as Relation
from scaletune.fitting.relations.solver import fit_relation as fit_relation
from scaletune.fitting.relations.solver import of_group as of_group
from scaletune.fitting.relations.solver import predict_relation as predict_relation
from scaletune.fitting.relations.solver import solved_relation as solved_relation

RELATIONS: Mapping[str, Relation] = {
    **critical.RELATIONS, **trajectory.RELATIONS, **downstream.RELATIONS, **repetition.RELATIONS, **schedule.RELATIONS, **curves.RELATIONS,
}  # fmt: skip
