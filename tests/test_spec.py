"""task.toml: what it means, and every mistake in it told as file, line, key and remedy."""

from pathlib import Path

import pytest

from models.errors import UserError
from models.spec import MAX_TASK_BYTES, Round, load_task, net_names, parse_task, task_digest
from models.tomlfile import line_of, seconds, size_bytes

TASK = """\
name = "spindle-wear"
kind = "classification"
net = "tcn"
personal = ["head"]

[window]
length = 30
stride = 2
rate_hz = 4.0

[[signal]]
name = "T24"
unit = "degC"

[[signal]]
name = "vib"

[target]
name = "wear"
classes = ["ok", "worn"]

[alarm]
classes = ["worn"]

[training]
epochs = 2

[round]
min_gateways = 3
deadline = "2h"
every = "7d"
"""


def change(old: str, new: str) -> str:
    assert TASK.count(old) == 1
    return TASK.replace(old, new)


def test_a_good_one(tmp_path: Path) -> None:
    (tmp_path / "task.toml").write_text(TASK)
    task, text = load_task(tmp_path / "task.toml")
    assert text == TASK
    assert len(task_digest(text)) == 32
    assert task.input_shape == (2, 30)
    assert (task.channels, task.outputs, task.normalise) == (2, 2, "gateway")
    assert task.signal[1].unit == "1"
    assert (task.round.deadline_s, task.round.every_s) == (7200, 604_800)
    assert task.personal == ("head",)


def test_what_follows_from_kind_and_window() -> None:
    number = change("classification", "regression").replace('classes = ["ok", "worn"]\n', "range = [0.0, 2.0]\n")
    number = number.replace('[alarm]\nclasses = ["worn"]\n', "[alarm]\nabove = 1.5\n")
    assert parse_task(number).outputs == 1
    anomaly = number.partition("[target]")[0].replace("regression", "anomaly").replace("tcn", "autoencoder")
    assert parse_task(anomaly).outputs == 60
    assert parse_task(change("rate_hz = 4.0", "waveform = true")).normalise == "window"
    assert parse_task(change("rate_hz = 4.0", 'waveform = true\nnormalise = "gateway"')).normalise == "gateway"


# What is written, in place of what; then line, key, a word of the problem and of the remedy.
CODECS = 'write one of: "float32", "int2", "int4", "int8", "ring", "sparse"'
MISTAKES: dict[str, tuple[str, str, int, str, str, str]] = {
    "no TOML": ("kind =", "kind", 2, "", "not TOML", "mend the syntax"),
    "unknown key": ("stride", "strid", 8, "window.strid", "unknown key", "did you mean 'stride'?"),
    "unknown key in a list": (
        'unit = "degC"',
        'units = "degC"',
        13,
        "signal[0].units",
        "unknown key",
        "did you mean 'unit'?",
    ),
    "missing key": ('name = "vib"\n', "", 15, "signal[1].name", "missing", "add a line name = "),
    "missing table": (
        "[window]\nlength = 30\nstride = 2\nrate_hz = 4.0\n",
        "",
        1,
        "window",
        "missing",
        "add a table [window]",
    ),
    "wrong type": (
        "length = 30",
        'length = "30"',
        7,
        "window.length",
        "is text in quotes",
        "write a whole number",
    ),
    "wrong kind": ('"classification"', '"forecast"', 2, "kind", "forecast", 'write one of: "anomaly"'),
    "a name that is no topic": ("spindle-wear", "spindle/wear", 1, "name", "can't be a topic level", "use A-Z a-z 0-9"),
    "no such net": ('"tcn"', '"lstm"', 3, "net", "no net 'lstm'", "write one of: autoencoder"),
    "a net for another kind": ('"tcn"', '"autoencoder"', 3, "net", "learns no target", "write tcn, mlp or cnn2d"),
    "no length": ("length = 30", "length = 0", 7, "window.length", "out of range", "write 1 to 65536"),
    "a length too large": ("length = 30", "length = 65537", 7, "window.length", "out of range", "write 1 to 65536"),
    "no stride": ("stride = 2", "stride = 0", 8, "window.stride", "out of range", "write 1 to 1000000"),
    "no rate": ("rate_hz = 4.0", "rate_hz = 0.0", 9, "window.rate_hz", "out of range", "above 0"),
    "a rate that is no number": ("rate_hz = 4.0", "rate_hz = nan", 9, "window.rate_hz", "out of range", "above 0"),
    "a quality": ("rate_hz = 4.0", "min_quality = 1.1", 9, "window.min_quality", "out of range", "write 0.0 to 1.0"),
    "a signal twice": (
        'name = "vib"',
        'name = "T24"',
        16,
        "signal[1].name",
        "'T24' is named twice",
        "give each its own",
    ),
    "no target": ('[target]\nname = "wear"\nclasses = ["ok", "worn"]\n', "", 1, "target", "missing", "add [target]"),
    "one class": (
        '["ok", "worn"]',
        '["worn"]',
        20,
        "target.classes",
        "needs two classes or more",
        'classes = ["ok", "worn"]',
    ),
    "an alarm of no class": (
        '[alarm]\nclasses = ["worn"]',
        '[alarm]\nclasses = ["broken"]',
        23,
        "alarm.classes",
        "no class 'broken'",
        "use a name of target.classes",
    ),
    "an empty range": (
        'name = "wear"',
        'name = "wear"\nrange = [2.0, 2.0]',
        20,
        "target.range",
        "is empty",
        "write [lowest, highest]",
    ),
    "a holdout of all": (
        "epochs = 2",
        "holdout = 1.0",
        26,
        "training.holdout",
        "out of range",
        "write a part, such as 0.2",
    ),
    "no epoch": ("epochs = 2", "epochs = 0", 26, "training.epochs", "out of range", "write 1 to 1000"),
    "too many epochs": ("epochs = 2", "epochs = 1001", 26, "training.epochs", "out of range", "write 1 to 1000"),
    "no batch": ("epochs = 2", "batch = 0", 26, "training.batch", "out of range", "write 1 to 65536"),
    "a batch too large": ("epochs = 2", "batch = 65537", 26, "training.batch", "out of range", "write 1 to 65536"),
    "no lr": ("epochs = 2", "lr = 0.0", 26, "training.lr", "out of range", "above 0, at most 1"),
    "an lr too large": ("epochs = 2", "lr = 1.01", 26, "training.lr", "out of range", "above 0, at most 1"),
    "an lr that is no number": ("epochs = 2", "lr = nan", 26, "training.lr", "out of range", "above 0, at most 1"),
    "an lr without end": ("epochs = 2", "lr = inf", 26, "training.lr", "out of range", "above 0, at most 1"),
    "a quantile": ('["worn"]\n\n[t', '["worn"]\nquantile = 1.0\n[t', 24, "alarm.quantile", "out of range", "0.99"),
    "a drift": ('["worn"]\n\n[t', '["worn"]\n[drift]\nabove = 0.0\n[t', 25, "drift.above", "out of range", "0.25"),
    "few windows of drift": (
        '["worn"]\n\n[t',
        '["worn"]\n[drift]\nwindows = 99\n[t',
        25,
        "drift.windows",
        "out of range",
        "100 to 20000",
    ),
    "early is late": ('"7d"', '"7d"\nearly = "7d"', 32, "round.early", "no earlier than", "less than every"),
    "early in no step": (
        '"7d"',
        '"7d"\nearly = "1d"\nmode = "async"',
        32,
        "round.early",
        "no earlier than",
        "or leave it out",
    ),
    "early, when": ('"7d"', '"7d"\nearly = "soon"', 32, "round.early", "'soon' is not a duration", 'write "90s"'),
    "vote": ("min_gateways = 3", 'vote = "soon"', 29, "round.vote", "not a duration", 'write "90s"'),
    "vote in async": (
        "min_gateways = 3",
        'mode = "async"\nvote = "5s"',
        30,
        "round.vote",
        "waits for no vote",
        'write "0s"',
    ),
    "tolerance": ("min_gateways = 3", "tolerance = 2.0", 29, "round.tolerance", "out of range", "write 0.0 to 1.0"),
    "no round": ("min_gateways = 3", "rounds = 0", 29, "round.rounds", "out of range", "write 1 or more, or leave"),
    "a stride too large": ("stride = 2", "stride = 1000001", 8, "window.stride", "out of range", "1 to 1000000"),
    "a duration too long": ('"7d"', '"3661d"', 31, "round.every", "out of range", "ten years at most"),
    "a duration without end": ('"2h"', f'"{"9" * 400}h"', 30, "round.deadline", "out of range", "ten years at most"),
    "more than the most": (
        "epochs = 2",
        "min_windows = 30\nmax_windows = 20",
        26,
        "training.min_windows",
        "out of range",
        "1 to max_windows",
    ),
    "no gateway": ("min_gateways = 3", "min_gateways = 0", 29, "round.min_gateways", "out of range", "write 1 or more"),
    "a momentum": ("min_gateways = 3", "momentum = 1.0", 29, "round.momentum", "out of range", "write 0.0 to 0.99"),
    "a ring that waits for nobody": (
        "min_gateways = 3",
        'codec = "ring"\nmode = "async"',
        29,
        "round.codec",
        "of one round",
        "sync",
    ),
    "a ring that weighs": (
        "min_gateways = 3",
        'codec = "ring"\nweigh = "quality"',
        30,
        "round.weigh",
        "themselves",
        "samples",
    ),
    "a codec": ("min_gateways = 3", 'codec = "zip"', 29, "round.codec", "zip", CODECS),
    "a share": ("min_gateways = 3", "keep = 0.0", 29, "round.keep", "out of range", "write 0.001 to 0.5"),
    "a buffer in step": ("min_gateways = 3", "buffer = 4", 29, "round.buffer", "waits for everybody", 'mode = "async"'),
    "a small buffer": (
        "min_gateways = 3",
        'min_gateways = 3\nmode = "async"\nbuffer = 2',
        31,
        "round.buffer",
        "less than",
        "3 or",
    ),
    "a duration": ('"2h"', '"2 hours"', 30, "round.deadline", "'2 hours' is not a duration", 'write "90s", "2h"'),
    "no unit of time": ('"7d"', '"7"', 31, "round.every", "'7' is not a duration", 'write "90s", "2h"'),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(mistake: str) -> None:
    old, new, line, key, problem, remedy = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        parse_task(change(old, new), "wear.toml")
    error = caught.value
    assert (error.place, error.line, error.key) == ("wear.toml", line, key)
    assert problem in error.problem
    assert remedy in error.remedy
    assert "\n" not in str(error)
    assert str(error).startswith(f"wear.toml:{line}: {key}: " if key else f"wear.toml:{line}: ")


def test_more_mistakes() -> None:
    with pytest.raises(UserError, match=r"^t: larger than 65536 bytes; a task is a short text"):
        parse_task("#" * (MAX_TASK_BYTES + 1), "t")
    anomaly = change("classification", "anomaly").replace("tcn", "autoencoder")
    with pytest.raises(UserError, match="target: an anomaly task has no target; remove it"):
        parse_task(anomaly, "t")
    with pytest.raises(UserError, match="net: gives no reconstruction; write autoencoder"):
        parse_task(anomaly.partition("[target]")[0].replace("autoencoder", "mlp"), "t")
    bare = 'name = "a"\nkind = "anomaly"\nnet = "autoencoder"\nsignal = []\n[window]\nlength = 3\n'
    with pytest.raises(UserError, match=r"t:4: signal: no signal; add a \[\[signal\]\] table"):
        parse_task(bare, "t")


def test_the_largest_window() -> None:
    signals = "".join(f'[[signal]]\nname = "s{i}"\n' for i in range(62))
    text = change("length = 30", "length = 64000")
    with pytest.raises(UserError, match=r"t:7: window.length: 4096000 values in a window; length \* signals may be"):
        parse_task(text.replace("[target]", signals + "[target]"), "t")
    assert parse_task(change("length = 30", "length = 64000")).window.length == 64_000


def test_what_is_just_allowed() -> None:
    text = change("epochs = 2", "epochs = 1000\nbatch = 65536\nlr = 1.0").replace("stride = 2", "stride = 1000000")
    task = parse_task(text.replace('"7d"', '"3660d"').replace("min_gateways = 3", "rounds = 1"))
    assert (task.training.lr, task.round.rounds) == (1.0, 1)


def test_nets_are_the_files_there_are() -> None:
    assert {"autoencoder", "mlp", "tcn"} <= set(net_names())
    assert not [name for name in net_names() if name.startswith("_")]


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("1.5h", 5400), (" 2 w ", 1_209_600), ("15min", 900), ("250ms", 0.25)]
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "s", "-1s", "1", "1 year", "1e3s", "nans", "1s 2s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        seconds(text)


@pytest.mark.parametrize(
    ("text", "value"), [("64MiB", 64 << 20), ("1.5kB", 1500), ("2GiB", 2 << 30), ("7 B", 7), ("500MB", 5 * 10**8)]
)
def test_sizes(text: str, value: int) -> None:
    assert size_bytes(text) == value


@pytest.mark.parametrize("text", ["", "64", "64mib", "-1MiB", "1 MiB MiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        size_bytes(text)


def test_lines_of_keys() -> None:
    text = 'a = 1\n[b]\n"c d" = 2 # [e]\n[[f]]\n[f.g]\nh = 1\n[[f]]\nx.y = 3\n'
    found = {
        ("a",): 1, ("b",): 2, ("b", "c d"): 3, ("f", 0): 4, ("f", 0, "g", "h"): 6, ("f", 1): 7, ("f", 1, "x", "y"): 8,
        ("b", "z"): 2, ("q",): 1,
    }  # fmt: skip
    assert {path: line_of(text, path) for path in found} == found


def test_an_update_weighs_its_windows_or_what_was_good_of_them() -> None:
    plain, by_quality = Round(), Round(weigh="quality")
    assert plain.weight(100, 500_000) == 100
    assert [by_quality.weight(100, quality) for quality in (1_000_000, 505_000, 1)] == [100, 50, 1]
