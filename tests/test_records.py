"""Records: atomic writes, reading back, merging, redaction, and errors for other files."""

import json
import os
import sqlite3
import threading
import zlib
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletune.errors import UserError
from scaletune.records import (
    COLUMNS,
    Fit,
    Store,
    Trial,
    digest,
    frame,
    merge_trials,
    read_jsonl,
    read_store,
    read_trials,
    redact,
    write_atomically,
)
from scaletune.records import store as store_module

TRIAL = Trial(
    id="a",
    sweep="main",
    point={"model": {"width": 32}},
    n_params=10,
    n_params_total=20,
    tokens=100,
    batch_tokens=10,
    seq_len=5,
    width=32,
    depth=2,
    lr=1e-3,
    weight_decay=0.1,
    seed=0,
    status="done",
    loss=3.5,
    train_loss=3.25,
    flops=1e9,
    seconds=1.5,
    provenance={"torch": "2"},
)
DIVERGED = replace(
    TRIAL,
    id="b",
    status="diverged",
    loss=None,
    train_loss=None,
    message="loss nan at step 3 of 10",
    lr=1.0,
)
FIT = Fit(
    law="lr_nd",
    params={"a": {"value": -0.5, "interval": [-0.6, -0.4]}},
    solution={"vector": [1.0, 2.0]},
    objective=0.1,
    used=["a"],
    dropped={"b": "diverged"},
    status=["a sentence"],
    ranges={"n_params": [1.0, 2.0]},
    provenance={"at": "now"},
)
NESTED = replace(FIT, loss_law=replace(FIT, law="loss_nd", provenance={"at": "then"}))


def line(trial, **changed):
    return json.dumps(asdict(trial) | changed) + "\n"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values))
def test_a_digest_is_of_the_value_not_of_its_order(value):
    backwards = dict(reversed(value.items()))
    assert digest(value) == digest(backwards) == digest(json.loads(json.dumps(value)))
    assert digest(value) != digest(value | {"one more key": 0})


def test_a_digest_is_sha256_of_canonical_json():
    # printf '{"a":[1.5,null],"b":1}' | sha256sum
    assert digest({"b": 1, "a": [1.5, None]}) == "cf0c4895ed707baa"
    with pytest.raises(ValueError, match="JSON compliant"):
        digest({"a": float("nan")})


# --- files ----------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        UserError, match=r"`.*file.json` must be writable, but No space left on device"
    ):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.json"]


def test_a_reader_never_sees_a_partial_file(tmp_path, monkeypatch):
    """Before `os.replace`, the complete new text is on disk in the same folder."""
    path, moves, move = tmp_path / "file.json", [], os.replace

    def watch(part, target):
        moves.append((Path(part).read_text(), Path(part).parent, target))
        move(part, target)

    monkeypatch.setattr(os, "replace", watch)
    write_atomically(path, "new é")
    assert moves == [("new é", tmp_path, path)] and path.read_bytes() == "new é".encode()


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be writable"):
        write_atomically(tmp_path / "file" / "x.json", "")
    with pytest.raises(UserError, match="must be a writable SQLite file"):
        Store(tmp_path / "file" / "sweep")


# --- trials ---------------------------------------------------------------------------------------


def test_the_contract_is_in_every_trial():
    assert set(COLUMNS) <= {field.name for field in fields(Trial)}


def test_a_store_gives_back_what_was_put(tmp_path):
    store = Store(tmp_path / "gpt-1.5b")
    store.put(DIVERGED, [5.5, float("inf")])
    store.put(TRIAL, np.float32([4.0, 3.3]).tolist())
    store.put(replace(TRIAL, loss=0.0))  # the first record of an id stays
    assert store.trials() == [TRIAL, DIVERGED]
    assert store.curve("a") == np.float32([4.0, 3.3]).tolist()
    assert store.curve("b") == [5.5, float("inf")]
    assert store.curve("c") == []
    assert store.export() == tmp_path / "gpt-1.5b.jsonl"  # a dot in the name starts no suffix
    store.close()
    assert sorted(read_jsonl(tmp_path / "gpt-1.5b.jsonl"), key=lambda trial: trial.id) == [
        TRIAL,
        DIVERGED,
    ]
    assert (tmp_path / "gpt-1.5b.db").exists()


def test_a_record_is_the_same_bytes_whatever_the_order(tmp_path):
    texts = []
    for name, trials in (("one", [TRIAL, DIVERGED]), ("two", [DIVERGED, TRIAL])):
        store = Store(tmp_path / name)
        for trial in trials:
            store.put(trial)
        texts += [store.export().read_bytes(), store.export().read_bytes()]
        store.close()
    assert len(set(texts)) == 1


def test_export_keeps_the_lines_of_others_and_prefers_its_own(tmp_path):
    (tmp_path / "sweep.jsonl").write_text(line(DIVERGED) + line(TRIAL, loss=9.0))
    store = Store(tmp_path / "sweep")
    assert store.trials() == []
    store.put(TRIAL)
    exported = {trial.id: trial for trial in read_jsonl(store.export())}
    store.close()
    assert exported == {"a": TRIAL, "b": DIVERGED}


def test_adopt_imports_existing_records(tmp_path):
    (tmp_path / "sweep.jsonl").write_text(line(DIVERGED))
    store = Store(tmp_path / "sweep", adopt=True)
    assert store.trials() == [DIVERGED]
    store.close()


def test_deleted_trials_can_be_recorded_again(tmp_path):
    store = Store(tmp_path / "sweep")
    store.put(replace(TRIAL, status="failed"))
    store.delete(["a", "unknown"])
    store.put(TRIAL)
    assert store.trials() == [TRIAL]
    store.close()


def test_a_write_that_fails_is_undone(tmp_path):
    store = Store(tmp_path / "sweep")
    with pytest.raises(ValueError, match="could not convert"):
        store.put(TRIAL, ["no number"])
    assert store.trials() == []
    store.put(TRIAL)  # the lock is free again
    store.close()


@pytest.mark.parametrize("tail", ["", line(DIVERGED)[:-20], '{"id"', "\n\n"])
def test_an_incomplete_last_line_is_left_out(tmp_path, tail):
    (tmp_path / "sweep.jsonl").write_text(line(TRIAL) + tail)
    assert read_jsonl(tmp_path / "sweep.jsonl") == [TRIAL]


def test_a_last_line_without_its_newline_counts(tmp_path):
    (tmp_path / "sweep.jsonl").write_text(line(TRIAL) + line(DIVERGED).strip())
    assert read_jsonl(tmp_path / "sweep.jsonl") == [TRIAL, DIVERGED]


BAD = {  # text of a second line -> the sentence
    "{torn\n": "every line of .*sweep.jsonl:2 must be JSON, but ",
    "[1, 2]\n": r"every line of .*sweep.jsonl:2 must be a trial, but got '\[1, 2\]'",
    line(
        TRIAL, schema=3
    ): "sweep.jsonl:2 has schema 3, newer than the 2 of this scaletune: upgrade scaletune",
    line(TRIAL, schema="1"): "every line of .*sweep.jsonl:2 must be a trial",
    line(
        TRIAL, colour="red"
    ): "sweep.jsonl:2 is not a record of trials: .*unexpected keyword argument 'colour'",
    '{"loss": 3}\n': "sweep.jsonl:2 is not a record of trials: missing",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_line_is_named(tmp_path, text):
    (tmp_path / "sweep.jsonl").write_text(line(TRIAL) + text)
    with pytest.raises(UserError, match=BAD[text]):
        read_trials(tmp_path / "sweep.jsonl")


def test_readers_take_any_of_the_three_files(tmp_path):
    store = Store(tmp_path / "sweep")
    for trial in (DIVERGED, TRIAL):
        store.put(trial)
    store.export()
    store.close()
    frame([TRIAL, DIVERGED])[list(COLUMNS)].to_csv(tmp_path / "sweep.csv", index=False)
    tables = {
        suffix: read_trials(tmp_path / f"sweep.{suffix}") for suffix in ("jsonl", "db", "csv")
    }
    pd.testing.assert_frame_equal(tables["jsonl"], tables["db"])
    pd.testing.assert_frame_equal(tables["jsonl"][list(COLUMNS)], tables["csv"])
    loss = tables["jsonl"]["loss"]
    assert loss.tolist()[0] == 3.5
    assert loss.isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jsonl", None, "the records file must exist, but got `.*none.jsonl`"),
        (
            "records.json",
            b"{}",
            "records must be a .jsonl, .db or .csv file, but got `.*records.json`",
        ),
        (
            "empty.jsonl",
            b"",
            "a records file must hold at least one trial, but `.*empty.jsonl` is empty",
        ),
        (
            "empty.csv",
            b"",
            "a records file must hold at least one trial, but `.*empty.csv` is empty",
        ),
        (
            "head.csv",
            b"lr,loss\n",
            "a records file must hold at least one trial, but `.*head.csv` is empty",
        ),
        ("torn.jsonl", b'{"id"', "a records file must hold at least one trial"),
        ("bytes.jsonl", b"\xff\xfe\n", "`.*bytes.jsonl` must be text in UTF-8"),
        ("bytes.csv", b"\xff\xfe\n", "`.*bytes.csv` must be a table of comma-separated values"),
        (
            "ragged.csv",
            b"lr,loss\n1,2\n1,2,3,4\n",
            "`.*ragged.csv` must be a table of comma-separated values",
        ),
        (
            "text.db",
            b"no database, whatever its name says",
            "`.*text.db` must be the database of a sweep, but file is not a database",
        ),
    ],
)
def test_other_files_are_refused_with_one_sentence(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_trials(tmp_path / name)


def test_a_database_of_something_else_is_refused(tmp_path):
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE trials (number REAL)")
    other.close()
    with pytest.raises(
        UserError, match=r"`.*other.db` must be the database of a sweep, but no such column"
    ):
        read_trials(tmp_path / "other.db")


@given(lrs=st.lists(st.floats(1e-5, 1), min_size=1, max_size=6, unique=True), seed=st.randoms())
def test_a_frame_has_a_deterministic_order(lrs, seed):
    trials = [replace(TRIAL, id=str(i), lr=lr) for i, lr in enumerate(lrs)]
    shuffled = seed.sample(trials, len(trials))
    pd.testing.assert_frame_equal(frame(trials), frame(shuffled))
    assert frame(trials)["lr"].tolist() == sorted(lrs)


OLDER = """
CREATE TABLE trials (id TEXT PRIMARY KEY, line TEXT NOT NULL);
CREATE TABLE curves (id TEXT PRIMARY KEY, losses BLOB NOT NULL);
INSERT INTO trials VALUES ('a', '{a}');
INSERT INTO trials VALUES ('b', '{b}');
INSERT INTO curves VALUES ('a', x'{curve}');
"""  # the database of version 0.1.0, with a line of schema 1, which had no `metrics`


@pytest.fixture
def older(tmp_path):
    """Path of a database that version 0.1.0 wrote."""
    first = {key: value for key, value in asdict(TRIAL).items() if key != "metrics"} | {"schema": 1}
    failed = asdict(DIVERGED) | {"status": "failed"}
    curve = zlib.compress(np.float32([4.0, 3.5]).tobytes()).hex()
    db = sqlite3.connect(tmp_path / "old.db")
    db.execute("PRAGMA journal_mode=WAL")
    db.executescript(OLDER.format(a=json.dumps(first), b=json.dumps(failed), curve=curve))
    db.close()
    return tmp_path / "old.db"


def test_an_older_store_is_read_as_it_is_and_migrated_by_its_driver(older):
    expected = [replace(TRIAL, schema=1), replace(DIVERGED, status="failed")]
    before = older.read_bytes()
    assert read_store(older) == (expected, {}) and read_trials(older)["id"].tolist() == ["a", "b"]
    assert older.read_bytes() == before
    for _ in range(2):
        store = Store(older)
        assert store.trials() == expected and store.curve("a") == [4.0, 3.5]
        assert store.statuses() == {"a": "done", "b": "failed"}
        store.close()
    with closing(sqlite3.connect(older)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)


def test_an_interrupted_migration_leaves_the_older_store(older, monkeypatch):
    monkeypatch.setattr(
        store_module, "MIGRATIONS", (*store_module.MIGRATIONS, ("NO SUCH STATEMENT",))
    )
    with pytest.raises(UserError, match="must be a writable SQLite file, but near"):
        Store(older)
    with closing(sqlite3.connect(older)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (0,)
        assert [row[1] for row in db.execute("PRAGMA table_info(trials)")] == ["id", "line"]


def test_a_newer_store_is_refused_and_unchanged(tmp_path):
    with closing(sqlite3.connect(tmp_path / "new.db")) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA user_version = 9")
    before = (tmp_path / "new.db").read_bytes()
    for act in (Store, read_store):
        with pytest.raises(
            UserError,
            match=r"^`.*new.db` has schema 9, newer than the 2 of this scaletune: upgrade "
            r"scaletune$",
        ):
            act(tmp_path / "new.db")
    assert (tmp_path / "new.db").read_bytes() == before


def test_several_records_are_merged(tmp_path):
    """The first record of a trial stays, but a result replaces a failure.

    A table without ids is unchanged.
    """
    failed = replace(TRIAL, status="failed", loss=None)
    (tmp_path / "a.jsonl").write_text(line(failed) + line(replace(DIVERGED, loss=None)))
    (tmp_path / "b.jsonl").write_text(
        line(TRIAL)
        + line(replace(DIVERGED, message="another"))
        + line(replace(TRIAL, id="c", seed=1))
    )
    frame([replace(TRIAL, id="d", seed=2)])[list(COLUMNS)].to_csv(tmp_path / "c.csv", index=False)
    both = read_trials([tmp_path / "a.jsonl", str(tmp_path / "b.jsonl")])
    assert both["id"].tolist() == ["a", "c", "b"]
    assert both["status"].tolist() == [
        "done",
        "done",
        "diverged",
    ]
    assert both["message"].tolist()[2] == DIVERGED.message
    reverse = frame(merge_trials(*map(read_jsonl, (tmp_path / "b.jsonl", tmp_path / "a.jsonl"))))
    pd.testing.assert_frame_equal(both, reverse.assign(message=both["message"]))
    three = read_trials([tmp_path / "a.jsonl", tmp_path / "c.csv", tmp_path / "b.jsonl"])
    assert sorted(three["seed"]) == [0, 0, 1, 2] and three["loss"].notna().sum() == 3
    with pytest.raises(UserError, match="records must be one file or several, but got none"):
        read_trials([])


def test_partial_files_of_killed_writers_are_removed_at_the_next_export(tmp_path):
    (tmp_path / ".sweep.jsonl.4711.part").write_text("half")
    (tmp_path / ".other.jsonl.4711.part").write_text("another's")
    store = Store(tmp_path / "sweep")
    store.put(TRIAL)
    store.export()
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.jsonl.4711.part",
        "sweep.db",
        "sweep.jsonl",
    ]


def test_an_export_waits_for_the_writer_and_misses_nothing(tmp_path):
    """With two exports at once, the file is that of the later one."""
    driver, exports = Store(tmp_path / "sweep"), []

    def export():
        store = Store(tmp_path / "sweep")
        store.export()
        store.close()
        exports.append(True)

    driver.put(TRIAL)
    with driver.write():
        thread = threading.Thread(target=export)
        thread.start()
        driver._insert(DIVERGED)
        assert not exports
    thread.join(60)
    driver.close()
    assert exports and {trial.id for trial in read_jsonl(tmp_path / "sweep.jsonl")} == {"a", "b"}


SECRETS = {
    "OPENAI_API_KEY": "sk-12345678901",
    "WANDB_API_KEY": "wandb-secret-value",
    "AWS_SECRET_ACCESS_KEY": "aws/secret+value",
    "HF_TOKEN": "hf_qwertyuiop",
    "DB_PASSWORD": "correct horse",
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_of_the_environment_is_redacted(monkeypatch, name):
    monkeypatch.setenv(name, SECRETS[name])
    assert redact(f"401 for {SECRETS[name]}!") == "401 for ***!"


def test_what_is_not_a_secret_stays(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism-is-off")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("API_KEY", "short")
    text = "disabled short parallelism-is-off https://host:80/a@b at 12:30"
    assert redact(text) == text
    for text in (
        "batch_tokens=1048576, tokens: 12345678, token: 10000000",
        "unknown key `optimizer.learning_rate`",
        "KeyError: 'optimizer.weight_decay'",
        "pad_token='<|endoftext|>'",
        "tokenizer=/data/tokenizer.json",
        "loss 3.25 at step 10 of 400",
        "me@example.com",
        "key: optimizer.lr_ratio",
        "Expected secret to be a str",
        "a bearer of bad news",
    ):
        assert redact(text) == text
    assert redact("postgresql://me:pass@host/db") == "postgresql://***@host/db"


FORMS = {  # text with a secret that is in no environment variable -> redacted text
    "HF_TOKEN=hf-not-its-form-123 python": "HF_TOKEN=*** python",
    "export AWS_SECRET_ACCESS_KEY='abc/def+ghi=='; run": "export AWS_SECRET_ACCESS_KEY='***'; run",
    '{"api_key": "0123456789abcdef0123", "entity": "me"}': '{"api_key": "***", "entity": "me"}',
    "GET https://host/x?token=abcdef123456&page=2 403": "GET https://host/x?token=***&page=2 403",
    "headers: {'Authorization': 'Bearer abcdef.ghi-jkl'}": (
        "headers: {'Authorization': 'Bearer ***'}"
    ),
    "Authorization: Basic bWU6aHVudGVyMg== refused": "Authorization: Basic *** refused",
    "wandb login --password correct-horse": "wandb login --password ***",
    "s3://me:p@ss@bucket/key": "s3://***@bucket/key",
    "redis://:hunter2pass@host:1/0": "redis://***@host:1/0",
    "git clone https://tok3n@github.com/x": "git clone https://***@github.com/x",
    "Invalid user token hf_abcdefghijklmnopqrst.": "Invalid user token ***.",
    "Incorrect API key provided: sk-proj-abcdefghijklmnop1234.": "Incorrect API key provided: ***.",
}


@pytest.mark.parametrize("text", FORMS)
def test_known_forms_of_secrets_are_redacted(text):
    assert redact(text) == FORMS[text]


# --- fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [FIT, NESTED])
def test_a_fit_comes_back_as_it_was(tmp_path, fit):
    path = fit.write(tmp_path / "fits" / "name.json")
    assert Fit.read(path) == fit
    assert json.loads(path.read_text())["digest"] == fit.digest


def test_a_fits_digest_does_not_depend_on_provenance():
    assert replace(FIT, provenance={"at": "later"}).digest == FIT.digest
    later = replace(NESTED, loss_law=replace(NESTED.loss_law, provenance={"at": "later"}))
    assert later.digest == NESTED.digest != FIT.digest


CHANGED = {
    "law": "loss_nd",
    "params": {},
    "solution": {},
    "objective": 0.2,
    "cells": [{}],
    "ranges": {},
    "used": [],
    "dropped": {},
    "status": ["ok"],
    "held_out": {"a": 1},
    "loss_law": FIT,
    "level": 0.9,
    "assumptions": ["one"],
}


def test_a_fits_digest_depends_on_every_other_field():
    assert set(CHANGED) == {field.name for field in fields(Fit)} - {"provenance"}
    digests = {replace(FIT, **{name: value}).digest for name, value in CHANGED.items()}
    assert len(digests | {FIT.digest}) == len(CHANGED) + 1


def test_a_fit_with_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(FIT, objective=float("nan")).write(tmp_path / "fit.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "the fit file must exist, but got `.*fit.json`"),
        ("{torn", "a fit file must be JSON as `scaletune fit --out` writes it, but `.*fit.json`"),
        ("[1]", "a fit file must hold one object, but `.*fit.json` holds a list"),
        (
            "{}",
            "a fit file must hold the fields of a Fit, but got no law, no params, no solution, no "
            "objective",
        ),
        ('{"law": "lr_nd"}', "a fit file must hold the fields of a Fit, but got no params"),
        (
            json.dumps(FIT.to_dict() | {"colour": "red"}),
            "a fit file must hold the fields of a Fit, but got colour",
        ),
        (
            json.dumps(FIT.to_dict() | {"loss_law": {"law": "x"}}),
            "a fit file must hold the fields of a Fit, but got no params",
        ),
    ],
)
def test_other_content_is_refused_with_one_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "fit.json").write_text(content)
    with pytest.raises(UserError, match=f"^{sentence}"):
        Fit.read(tmp_path / "fit.json")
