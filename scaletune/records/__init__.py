"""Records and their files: `Trial` (one training result) and `Fit` (a fitted law).

A sweep has two files with the same stem. `NAME.db` is the SQLite database of the running driver.
`NAME.jsonl` is the record; the driver writes it atomically from the database whenever it stops.
Readers accept either, and several files at once.
"""

from scaletune.records.files import digest, write_atomically
from scaletune.records.fit import Fit
from scaletune.records.readers import read_trials
from scaletune.records.redaction import redact
from scaletune.records.store import Store, read_store
from scaletune.records.trial import (
    COLUMNS,
    FINISHED_SHARE,
    SCHEMA,
    Trial,
    frame,
    merge_trials,
    read_jsonl,
)

__all__ = [
    "COLUMNS",
    "FINISHED_SHARE",
    "SCHEMA",
    "Fit",
    "Store",
    "Trial",
    "digest",
    "frame",
    "merge_trials",
    "read_jsonl",
    "read_store",
    "read_trials",
    "redact",
    "write_atomically",
]
