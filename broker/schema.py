"""The tables of the journal, and what leads to them from those of earlier versions."""

SCHEMA_VERSION = 13
SCHEMA = """
CREATE TABLE keys(name TEXT PRIMARY KEY, private_key BLOB NOT NULL) STRICT;
CREATE TABLE roster(path TEXT PRIMARY KEY, public_key BLOB NOT NULL, since_ms INTEGER NOT NULL,
    how TEXT NOT NULL, agreement_key BLOB, session INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE tokens(hash BLOB PRIMARY KEY, path TEXT NOT NULL, expires_ms INTEGER NOT NULL,
    used INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE tasks(task TEXT PRIMARY KEY, text TEXT NOT NULL, layout TEXT NOT NULL, graph BLOB NOT NULL,
    graph_size INTEGER NOT NULL, graph_digest BLOB NOT NULL, strategy_state BLOB NOT NULL,
    residual BLOB NOT NULL DEFAULT x'') STRICT;
CREATE TABLE models(task TEXT NOT NULL, version INTEGER NOT NULL, round INTEGER NOT NULL, weights BLOB NOT NULL,
    digest BLOB NOT NULL, gateways INTEGER NOT NULL, samples INTEGER NOT NULL, created_ms INTEGER NOT NULL,
    step BLOB, signed_ms INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(task, version)) STRICT;
CREATE TABLE rounds(task TEXT NOT NULL, round INTEGER NOT NULL, base INTEGER NOT NULL, opened_ms INTEGER NOT NULL,
    deadline_ms INTEGER NOT NULL, state TEXT NOT NULL, closed_ms INTEGER, version INTEGER,
    roster_ms INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(task, round)) STRICT;
CREATE TABLE updates(task TEXT NOT NULL, round INTEGER NOT NULL, path TEXT NOT NULL, digest BLOB NOT NULL,
    samples INTEGER NOT NULL, metric REAL, payload BLOB, counted_ms INTEGER NOT NULL,
    base_loss REAL, counted_in INTEGER, UNIQUE(task, round, path)) STRICT;
CREATE TABLE ledger(seq INTEGER PRIMARY KEY, hash TEXT NOT NULL, line TEXT NOT NULL) STRICT;
CREATE TABLE looked(at_ms INTEGER NOT NULL) STRICT;
"""
_BALLOTS = """
CREATE TABLE ballots(task TEXT NOT NULL, version INTEGER NOT NULL, before INTEGER NOT NULL, until_ms INTEGER NOT NULL,
    strategy_state BLOB NOT NULL, residual BLOB NOT NULL, kept INTEGER, PRIMARY KEY(task, version)) STRICT;
CREATE TABLE votes(task TEXT NOT NULL, version INTEGER NOT NULL, path TEXT NOT NULL, against INTEGER NOT NULL,
    PRIMARY KEY(task, version, path)) STRICT;
"""
_RELEASES = """
CREATE TABLE metadata(name TEXT PRIMARY KEY, data BLOB NOT NULL) STRICT;
CREATE TABLE releases(task TEXT NOT NULL, release INTEGER NOT NULL, channel TEXT NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY(task, release)) STRICT;
"""
_RECEIPTS = """
CREATE TABLE receipts(topic TEXT NOT NULL, digest BLOB NOT NULL, envelope BLOB NOT NULL,
    PRIMARY KEY(topic, digest)) STRICT;
"""
SCHEMA += _BALLOTS + _RELEASES + _RECEIPTS
# What leads from each earlier schema to the next one.
UPGRADE = {
    1: """
ALTER TABLE tasks ADD COLUMN residual BLOB NOT NULL DEFAULT x'';
ALTER TABLE models ADD COLUMN step BLOB;
ALTER TABLE updates ADD COLUMN base_metric REAL;
""",
    2: "ALTER TABLE updates ADD COLUMN base_loss REAL;",
    3: "ALTER TABLE updates ADD COLUMN counted_in INTEGER; UPDATE updates SET counted_in = round;",
    4: "ALTER TABLE updates DROP COLUMN base_metric;",
    5: """
CREATE TABLE tokens(hash BLOB PRIMARY KEY, path TEXT NOT NULL, expires_ms INTEGER NOT NULL,
    used INTEGER NOT NULL DEFAULT 0) STRICT;
""",
    6: _BALLOTS,
    7: _RELEASES,
    8: _RECEIPTS,
    9: """
ALTER TABLE roster ADD COLUMN agreement_key BLOB;
ALTER TABLE roster ADD COLUMN session INTEGER NOT NULL DEFAULT 0;
""",
    10: "ALTER TABLE rounds ADD COLUMN roster_ms INTEGER NOT NULL DEFAULT 0;",
    11: "CREATE TABLE looked(at_ms INTEGER NOT NULL) STRICT; INSERT INTO looked SELECT 0 FROM tasks LIMIT 1;",
    12: "ALTER TABLE models ADD COLUMN signed_ms INTEGER NOT NULL DEFAULT 0; UPDATE models SET signed_ms = created_ms;",
}
