"""The records that go round: `Trial` (one training result) and `Fit` (a law with what it rests on), and their files.

A sweep lives in two files of one stem: `NAME.db`, the SQLite workbench of the running driver, and `NAME.jsonl`, the
record, written from it atomically at every stop. Readers take either, and several of them at once.
"""

from scaletune.records.files import digest, write_atomically
from scaletune.records.fit import Fit
from scaletune.records.readers import read_trials
from scaletune.records.redaction import scrubbed
from scaletune.records.store import Store, glance
from scaletune.records.trial import COLUMNS, SCHEMA, Trial, frame, merged, read_jsonl

__all__ = [
    "COLUMNS", "SCHEMA", "Fit", "Store", "Trial", "digest", "frame", "glance", "merged", "read_jsonl", "read_trials", "scrubbed",
    "write_atomically",
]  # fmt: skip
