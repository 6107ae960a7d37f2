"""The bench that decides, on small sets made here: the real machines, deterministic, and honest about its figures."""

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.choose import average, choose, mixed, trust, worst
from edge.cli import main
from edge.lab.recorded import read_recorded
from edge.lab.simulate import _UNMASKED
from edge.lab.simulated import _noise
from edge.lab.sites import complete_task, load_sites, remarks
from models.errors import UserError
from models.spec import parse_task

TASK = 'name = "lab"\n[training]\nepochs = 1\nbatch = 16\nlr = 5e-3\n[round]\nmin_gateways = 1\n'


def rows(folder: Path, kind: str = "classes", plants: int = 3) -> Path:
    """Plants that see the same rule through another offset; two of five features matter."""
    random = np.random.default_rng(7)
    client = np.repeat(np.arange(plants), 120)
    x = random.normal(size=(len(client), 5)).astype(np.float32)
    score = x[:, 0] - x[:, 1]
    y: NDArray[Any] = (score > 0).astype(np.int64) if kind == "classes" else score.astype(np.float32)
    if kind == "anomaly":
        y = np.zeros(len(client), np.int64)
    x[:, 2] += client
    train = np.arange(len(client)) % 3 > 0
    path = folder / "plants.npz"
    parts = {"x": x, "y": y, "client": client}
    arrays = {f"{k}_train": v[train] for k, v in parts.items()} | {f"{k}_test": v[~train] for k, v in parts.items()}
    if kind == "anomaly":
        arrays["y_test"] = (np.arange((~train).sum()) % 4 == 0).astype(np.int64)
        arrays["x_test"][arrays["y_test"] == 1] *= 4
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def command(folder: Path, data: Path, *more: str, text: str = TASK) -> list[str]:
    (folder / "task.toml").write_text(text)
    task = str(folder / "task.toml")
    return [sys.executable, "-P", "-m", "edge.cli", "simulate", task, "--data", str(data), *more]


def run(folder: Path, data: Path, *more: str, text: str = TASK) -> subprocess.CompletedProcess[str]:
    line = command(folder, data, *more, text=text)
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)


def figures(folder: Path, data: Path, *more: str, text: str = TASK) -> dict[str, Any]:
    done = run(folder, data, "--json", *more, text=text)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


KEYS = {
    "metric", "centralised", "silo_own", "silo_all", "federated", "personalised", "final", "final_vs_best",
    "worst_plant_vs_alone", "rounds_to", "bytes_up_per_update", "bytes_down_per_round", "float32_bytes", "ratio_up",
    "ratio_down",
}  # fmt: skip


def test_a_federation_of_classes_learns_and_says_the_same_twice(tmp_path: Path) -> None:
    data = rows(tmp_path)
    found = figures(tmp_path, data, "--rounds", "8")
    assert found.keys() >= KEYS
    assert found["metric"] == "accuracy"
    assert found["federated"] > 0.75
    assert found["centralised"] > 0.75
    assert len(found["curve"]) == found["rounds"] == 8
    assert [row["plant"] for row in found["plants"]] == ["0", "1", "2"]
    assert found["final"] == pytest.approx(np.mean([row["final"] for row in found["plants"]]), abs=1e-4)
    assert found["final_vs_best"] == pytest.approx(
        found["final"] / max(found["centralised"], found["silo_own"]), abs=1e-3
    )
    assert 0 < found["bytes_up_last"] < found["bytes_up_per_update"] < found["float32_bytes"] / 20
    again = figures(tmp_path, data, "--rounds", "8")
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    other = figures(tmp_path, data, "--rounds", "8", "--seed", "1")
    assert other["curve"] != found["curve"]


def test_numbers_are_judged_by_their_error_and_a_codec_can_be_chosen(tmp_path: Path) -> None:
    data = rows(tmp_path, "numbers")
    exact = figures(tmp_path, data, "--rounds", "6", "--codec", "float32", "--dropout", "0.3")
    assert exact["metric"] == "rmse"
    assert exact["federated"] < 1.0
    assert exact["final_vs_best"] == pytest.approx(
        min(exact["centralised"], exact["silo_own"]) / exact["final"], abs=1e-3
    )
    assert exact["ratio_up"] < 1.5
    whole = figures(tmp_path, data, "--rounds", "3", "--downlink", "float32")
    assert whole["ratio_down"] < 1.5
    steps = figures(tmp_path, data, "--rounds", "3")
    # Manifest and step together, of a net so small that the manifest is most of it.
    assert steps["bytes_down_manifest"] < 320
    assert steps["bytes_down_per_round"] < whole["bytes_down_per_round"] / 10
    assert steps["bytes_down_first"] > whole["bytes_down_per_round"]
    assert steps["curve"] != whole["curve"]


@pytest.mark.parametrize("mode", [(), ("--mode", "async", "--stale", "1")])
def test_every_round_comes_however_many_plants_miss_it(tmp_path: Path, mode: tuple[str, ...]) -> None:
    found = figures(tmp_path, rows(tmp_path), "--rounds", "12", "--dropout", "0.9", *mode)
    assert len(found["curve"]) == 12


def test_sums_in_a_ring_learn_too(tmp_path: Path) -> None:
    data = rows(tmp_path)
    found = figures(tmp_path, data, "--rounds", "10", "--codec", "ring")
    assert found["federated"] > 0.75
    assert found["bytes_up_per_update"] < found["float32_bytes"] / 8
    again = figures(tmp_path, data, "--rounds", "10", "--privacy", "secure-aggregation")
    assert again["curve"] == found["curve"]
    assert [note for note in again["notes"] if note not in found["notes"]] == [_UNMASKED]


def test_plants_that_lag_behind_still_learn_together(tmp_path: Path) -> None:
    data = rows(tmp_path)
    found = figures(tmp_path, data, "--rounds", "8", "--mode", "async", "--stale", "2")
    assert found["federated"] > 0.75
    in_step = figures(tmp_path, data, "--rounds", "8")
    assert found["curve"] != in_step["curve"]
    assert found["bytes_up"] < in_step["bytes_up"]  # who lags has nothing to say in the first rounds


def test_plants_of_half_a_net_send_less_and_move_what_they_have(tmp_path: Path) -> None:
    data = rows(tmp_path)
    whole, half, mixed, out = (
        figures(tmp_path, data, "--rounds", "8", "--width", width) for width in ("1", "0.5", "0=0.5,2=.5", "0=0,2=0")
    )
    assert half["federated"] > 0.7
    assert half["bytes_up_per_update"] < 0.75 * whole["bytes_up_per_update"]
    assert half["bytes_up_per_update"] < mixed["bytes_up_per_update"] < whole["bytes_up_per_update"]
    assert len({str(found["curve"]) for found in (whole, half, mixed, out)}) == 4
    assert [row["silo_own"] is None for row in out["plants"]] == [True, False, True]
    assert list(out["plants"][0]["model"]) == ["global"]
    assert out["bytes_up"] < 0.8 * mixed["bytes_up"]


def test_an_own_head_stays_with_half_a_net(tmp_path: Path) -> None:
    text = f'personal = ["head"]\n{TASK}'
    found = figures(tmp_path, rows(tmp_path), "--rounds", "6", "--width", "1=0.25", text=text)
    assert found["final"] > 0.7


def test_anomalies_need_no_labels(tmp_path: Path) -> None:
    plot = tmp_path / "plot.html"
    found = figures(tmp_path, rows(tmp_path, "anomaly"), "--rounds", "3", "--plot", str(plot))
    text = plot.read_text()
    assert "<td>  against all data or alone<td>" in text
    assert f"<td>{found['final']:.3f}" in text
    assert text.count("<polyline") == 4
    assert "http" not in text
    assert found["metric"] == "auroc"
    assert found["federated"] > 0.6


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--rounds", "0"), "--rounds: 0 rounds; write 1 or more"),
        (("--dropout", "1"), "--dropout: 1 is no chance below 1"),
        (("--keep", "0"), "--keep: 0 is no share"),
        (("--stale", "2"), "--stale: in step nobody lags behind; write --mode async too"),
        (("--stale", "99", "--mode", "async"), "--stale: 99 versions; write 0 to 8"),
        (("--seed", "-1"), "--seed: -1 is no seed; write 0 to 2147483647"),
        (("--codec", "int8", "--keep", "0.1"), "--keep: int8 keeps every value; leave it out, or write --codec sparse"),
        (("--strategy", "best"), "--strategy: no strategy 'best'; write one of: fedadam, fedavg"),
        (("--width", "0.6"), "--width: '0.6' is no width; write 0.25, 0.5, 0.75 or 1"),
        (("--width", "x=0.5"), "--width: no plant 'x'; plants are: 0, 1, 2"),
        (("--width", "0"), "--width: leaves out every plant"),
        (("--codec", "ring", "--mode", "async"), "--codec: sums in a ring are of one round; write --mode sync"),
        (("--privacy", "secure-aggregation", "--codec", "int8"), "--codec: int8 shows each update; leave it out"),
        (("--width", "1=.5", "--codec", "ring"), "--width: a ring adds updates of one size"),
        (("--data", "/nowhere.npz"), "/nowhere.npz: no such file; check the path of --data"),
        (("--data", "/usr"), "/usr: is a folder; name a .npz file in it"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path: Path, more: tuple[str, ...], says: str) -> None:
    done = run(tmp_path, rows(tmp_path), *more)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('name = "lab"\nnets = "mlp"\n', "task.toml:2: nets: unknown key; did you mean 'net'?"),
        ('name = "lab"\n[training]\n\nlr = 0\n', "task.toml:4: training.lr: out of range"),
        ('name = "lab"\n[[signal]]\nname = "T"\nunits = "degC"\n', "task.toml:4: signal[0].units: unknown key"),
        ('name = "lab"\nepochs\n', "task.toml:2: not TOML"),
        ('[federation]\nname = "press"\n', "task.toml:1: federation: unknown key"),
        (
            'name = "lab"\n\n[round]\nstrategy = "best"\n',
            "task.toml:4: round.strategy: no strategy 'best'; write one of: fedadam, fedavg",
        ),
        (
            'name = "lab"\n[window]\nlength = 9\n',
            "task.toml:3: window.length: 9 steps, and the data has 1; write 1, or leave [window] out",
        ),
        (
            'name = "lab"\n' + "".join(f'[[signal]]\nname = "s{i}"\n' for i in range(6)),
            "task.toml:2: signal[0]: 6 signals, and the data has 5 channels; leave [[signal]] out, or name of these: x",
        ),
    ],
)
def test_what_is_wrong_with_a_task_is_told_by_its_own_line(
    tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task.toml").write_text(text)
    assert main(["simulate", str(tmp_path / "task.toml"), "--data", str(rows(tmp_path))]) == 2
    assert f"{tmp_path}/{says}" in capsys.readouterr().err


def rewritten(path: Path, change: Any) -> Path:
    """Change the arrays of a file."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    change(arrays)
    np.savez(path, **arrays)
    return path


def test_signals_are_found_by_name(tmp_path: Path) -> None:
    """Of five channels the two that matter, the other way round."""
    data = rewritten(rows(tmp_path), lambda a: a.update(feature_names=np.array(["a b", "b", "c", "d", "e"])))
    text = f'{TASK}[[signal]]\nname = "b"\n[[signal]]\nname = "a b"\n'
    task = parse_task(complete_task(text, data))
    assert task.channels == 2
    with np.load(data) as file:
        known = {tuple(row) for row in file["x_train"][:, [1, 0]]}
    for site in load_sites(task, data):
        assert {tuple(row) for row in site.train.x[:, :, 0]} < known
    assert not list(remarks(task, data, load_sites(task, data)))
    assert figures(tmp_path, data, "--rounds", "6", text=text)["federated"] > 0.8


def poor(arrays: dict[str, NDArray[Any]]) -> None:
    """Of five plants: one all is well with, one with five samples, one without a test, one with labels alone, none."""
    client, tests = arrays["client_train"], arrays["client_test"]
    client[:] = 0
    client[:5] = 1
    client[6:26] = 2
    client[30:34] = 3
    tests[tests == 2] = 0
    arrays["y_train"] = arrays["y_train"].astype(np.float64)
    arrays["y_train"][30:34] = np.nan
    arrays["x_train"][:, 4] = np.nan
    arrays["feature_names"] = np.array(["one"])
    arrays["client_names"] = np.array(["whole", "few", "untested", "unknown", "absent"])


def test_plants_that_lack_something_take_part_and_it_is_said(tmp_path: Path) -> None:
    data = rewritten(rows(tmp_path), poor)
    text = f'kind = "classification"\n{TASK}[target]\nname = "t"\nclasses = ["ok", "worn", "lost"]\n'
    text += "".join(f'[[signal]]\nname = "s{i}"\n' for i in range(5))
    done = run(tmp_path, data, "--rounds", "2", text=text)
    assert done.returncode == 0, done.stderr
    for said in (
        "feature_names has 1 names for 5 channels: they are not used",
        "signals are the data's channels in their order: it has none called 's0'",
        "left out, without a sample to train on: unknown, absent",
        "without a test, and so in no mean: untested",
        "of the samples to train on have no label, and are left out",
        "signal s4: 0% of its values are numbers",
        "no plant has a sample to train on of: lost",
    ):
        assert said in done.stderr
    assert "federation, for a plant" in done.stdout
    assert "untested" in done.stdout


def in_session(leader: int) -> list[int]:
    """The processes that a session's leader has started, itself among them; not those that ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            found += [int(path.parent.name)] if int(session) == leader and state != "Z" else []
    return found


def test_nothing_of_a_simulation_outlives_it(tmp_path: Path) -> None:
    line = command(tmp_path, rows(tmp_path), "--rounds", "100000")
    with subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        # The resource tracker, the server of the workers, and the workers.
        while len(in_session(process.pid)) < 3 + len(os.sched_getaffinity(0)):
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
        process.wait()
        end = time.monotonic() + 60
        while in_session(process.pid):
            assert time.monotonic() < end
            time.sleep(0.1)


def far_apart(arrays: dict[str, Any]) -> None:
    for part in ("train", "test"):
        arrays[f"client_{part}"] = arrays[f"client_{part}"] * 1000


def test_plants_may_be_numbered_with_gaps(tmp_path: Path) -> None:
    done = run(tmp_path, rewritten(rows(tmp_path), far_apart), "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    assert {plant["plant"] for plant in json.loads(done.stdout)["plants"]} >= {"0", "1000"}


@pytest.mark.parametrize("kind", ["classes", "numbers", "anomaly"])
def test_a_plant_of_a_handful_of_samples_takes_part(tmp_path: Path, kind: str) -> None:
    """Nothing is left for its holdout."""
    data = rewritten(rows(tmp_path, kind), lambda a: a["client_train"].__setitem__(slice(1, 80), 1))
    found = figures(tmp_path, data, "--rounds", "2")
    assert found["plants"][0]["windows"] == 1
    assert "with too few samples for a holdout, and so without a choice: 0" in found["notes"]


def constant(arrays: dict[str, Any]) -> None:
    arrays["x_train"][arrays["client_train"] == 1, 3] = 4.0


def missing(arrays: dict[str, Any]) -> None:
    arrays["x_train"][arrays["client_train"] == 2, 4] = np.nan


def one_class(arrays: dict[str, Any]) -> None:
    for part in ("train", "test"):
        arrays[f"y_{part}"][arrays[f"client_{part}"] == 0] = 1


def floats(arrays: dict[str, Any]) -> None:
    arrays["y_train"] = arrays["y_train"].astype(np.float32)
    arrays["y_train"][:4] = np.nan


def few(arrays: dict[str, Any]) -> None:
    arrays["client_train"][10:80] = 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (constant, ["always the same, though not at most others: x3 at 1"]),
        (missing, ["without a value: x4 at 2"]),
        (
            one_class,
            [f"{what} one class alone, which is easily right: 0" for what in ("trains on", "is tested on")],
        ),
        (floats, ['labels are whole numbers, 0 to 1, and estimated as numbers; of classes, write kind = "classif']),
        (few, ["fewer than min_windows = 64 samples to train on, for which a gateway would wait: 0 (8)"]),
    ],
)
def test_what_decides_a_trial_is_said_of_the_data(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], told: list[str]
) -> None:
    data = rewritten(rows(tmp_path), change)
    task = parse_task(complete_task(TASK, data))
    said = list(remarks(task, data, load_sites(task, data)))
    for line in told:
        assert any(one.startswith(line) for one in said), said


@pytest.mark.parametrize(
    ("metric", "worth", "tested", "noise"),
    [
        ("accuracy", 0.91, 75, True),
        ("accuracy", 0.91, 100_000, False),
        ("accuracy", 0.9, 75, False),
        ("rmse", 1.0, 75, True),
        ("rmse", 2.0, 75, False),
    ],
)
def test_a_difference_within_the_noise_is_called_so(metric: str, worth: float, tested: int, noise: bool) -> None:  # noqa: FBT001
    assert bool(_noise(metric, worth, 0.9 if metric == "accuracy" else 1.05, tested)) == noise


def test_one_plant_alone_is_told_that_it_is(tmp_path: Path) -> None:
    found = figures(tmp_path, rows(tmp_path, plants=1), "--rounds", "2")
    assert found["notes"] == ["one plant: there is nobody to learn with"]


def test_anomalies_may_come_without_a_word_of_a_label(tmp_path: Path) -> None:
    def unlabelled(arrays: dict[str, NDArray[Any]]) -> None:
        arrays["y_train"] = np.full(len(arrays["y_train"]), np.nan)

    found = figures(tmp_path, rewritten(rows(tmp_path, "anomaly"), unlabelled), "--rounds", "2")
    assert found["metric"] == "auroc"
    assert found["notes"] == []
    done = run(tmp_path, rewritten(rows(tmp_path), unlabelled), text=f'kind = "classification"\n{TASK}')
    assert done.returncode == 2
    assert "y_train: no sample has a label, only NaN; give some, or kind" in done.stderr


def test_a_label_that_is_none_is_named(tmp_path: Path) -> None:
    text = f'kind = "classification"\n{TASK}[target]\nname = "t"\nclasses = ["ok", "worn"]\n'
    data = rewritten(rows(tmp_path), lambda a: a["y_test"].__setitem__(3, 7))
    done = run(tmp_path, data, text=text)
    assert "y_test: label 7 is none of the 2 classes; number the classes from 0 to 1" in done.stderr


def test_more_than_a_machine_can_hold_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(1000):
            archive.writestr(f"x_{i}.npy", b"")
    data = path.read_bytes()
    # A member's unpacked size stands at offset 24 of its entry in the directory (APPNOTE.TXT 4.3.12).
    first, *entries = data.split(b"PK\x01\x02")
    huge = (0xFFFF_FFF0).to_bytes(4, "little")
    path.write_bytes(b"PK\x01\x02".join([first, *(entry[:20] + huge + entry[24:] for entry in entries)]))
    with pytest.raises(UserError, match="GB unpacked, and this machine has"):
        read_recorded(path)


def test_what_a_task_says_itself_stays(tmp_path: Path) -> None:
    data = rows(tmp_path)
    text = complete_task('name = "lab"\nkind = "classification"\n[target]\nname = "t"\nclasses = ["a", "b"]\n', data)
    task = parse_task(text)
    assert task.target is not None
    assert task.target.classes == ("a", "b")
    assert (task.net, task.channels, task.window.length) == ("mlp", 5, 1)


def test_a_plants_holdout_is_no_part_of_what_it_trains_on(tmp_path: Path) -> None:
    data = rows(tmp_path)
    task = parse_task(complete_task(TASK, data))
    for site in load_sites(task, data):
        assert 0.1 < len(site.holdout) / (len(site.holdout) + len(site.train)) < 0.3
        seen = {row.tobytes() for row in site.train.x}
        assert not any(row.tobytes() in seen for row in site.holdout.x)


def test_trust_follows_the_evidence_and_a_small_holdout_has_little() -> None:
    good, bad = np.full(200, 0.2), np.full(200, 2.0)
    assert trust(np.stack([good, bad]), likelihood=True).tolist() == [1, 0]
    assert trust(np.stack([good, good]), likelihood=True).tolist() == [0.5, 0.5]
    few = trust(np.stack([good, bad])[:, :2], likelihood=True)
    assert 0.6 < few[0] < 0.9
    assert few.sum() == pytest.approx(1)
    # Each knows half of the windows: both are needed.
    half = np.arange(200) % 2 > 0
    both = trust(np.stack([np.where(half, good, bad), np.where(half, bad, good)]), likelihood=True)
    assert both == pytest.approx([0.5, 0.5])
    assert trust(np.stack([good, np.full(200, np.nan)]), likelihood=False).tolist() == [1, 0]
    assert trust(np.empty((3, 0)), likelihood=True).tolist() == pytest.approx([1 / 3] * 3)


def test_the_running_mean_follows_slowly() -> None:
    one, other = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert average(None, other) is other
    assert average(np.zeros(5, np.float32), other) is other  # another net
    mean = average(one, other)
    assert mean.dtype == np.float32
    assert mean.tolist() == [0.25] * 3
    assert average(mean, other).tolist() == [0.4375] * 3


def test_an_anomaly_is_what_either_model_finds_unusual() -> None:
    inputs = np.array([[[1.0, 1.0]], [[2.0, 2.0]]], np.float32)
    one, other = np.array([[1, 1], [0, 0]], np.float32), np.array([[3, 3], [2, 2]], np.float32)
    assert worst([one, other], inputs).tolist() == [[3, 3], [0, 0]]


def test_another_model_takes_over_when_it_is_better_by_more_than_noise() -> None:
    assert choose("accuracy", 0.97, 1.0, 400)
    assert not choose("accuracy", 0.97, 0.975, 100)
    assert choose("rmse", 2.0, 1.5, 400)
    assert not choose("rmse", 2.0, float("nan"), 400)


def test_models_together_are_the_mean_of_their_probabilities() -> None:
    one, other = np.log(np.array([[0.9, 0.1]], np.float32)), np.log(np.array([[0.3, 0.7]], np.float32))
    shared = np.exp(mixed("classification", [one, other], [0.75, 0.25]))
    np.testing.assert_allclose(shared, np.array([[0.75, 0.25]]), rtol=1e-5)
    numbers = [np.array([[1.0]], np.float32), np.array([[3.0]], np.float32)]
    np.testing.assert_allclose(mixed("regression", numbers, [0.5, 0.5]), 2)
