"""The bench that decides, on any data: pictures, odd plants, and the recorded sets where they are there."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.cli import main
from edge.lab.plc import data_layout
from edge.lab.recorded import read_recorded
from edge.lab.simulate import Scenario, simulate
from edge.lab.sites import carve, complete_task, load_sites, metric_of
from models.errors import UserError
from models.spec import parse_task
from tests import learning

TASK = 'name = "lab"\n[training]\nbatch = 16\nlr = 5e-3\n'
TASKS = sorted((Path(__file__).parent / "tasks").glob("*.toml"))
# A folder SET/SET.npz for each task; licences differ, so the recordings are no part of this project.
RECORDED = Path(os.environ.get("TUNDISH_RECORDED", Path(__file__).parents[2] / "shared" / "data"))
RANDOM = np.random.default_rng(3)


def save(path: Path, x: NDArray[Any], y: NDArray[Any], client: NDArray[Any], **more: NDArray[Any]) -> Path:
    """Every third sample is a test."""
    train = np.arange(len(y)) % 3 > 0
    parts = {"x": x, "y": y, "client": client}
    arrays = {f"{k}_train": v[train] for k, v in parts.items()} | {f"{k}_test": v[~train] for k, v in parts.items()}
    np.savez(path, **arrays, **more)  # type: ignore[arg-type]
    return path


def run(data: Path, rounds: int = 1, text: str = TASK) -> dict[str, Any]:
    found = simulate(Scenario(data, rounds, 0), text, "task.toml")
    json.dumps(found)
    return found


def pictures(count: int, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Grey noise; a defect is a bright spot of three by three pixels somewhere."""
    y = RANDOM.integers(0, 2, count)
    x = RANDOM.normal(0.5, 0.1, (count, 1, height, width)).astype(np.float32)
    for i in np.flatnonzero(y):
        row, column = RANDOM.integers(height - 3), RANDOM.integers(width - 3)
        x[i, 0, row : row + 3, column : column + 3] = 1.5
    return x, y


def test_the_page_of_figures_says_where_a_set_misses() -> None:
    row = {"plant": "p", "final": 0.8, "centralised": 0.9, "silo_own": 0.7}
    run_ = {
        "metric": "auroc", "seed": 0, "rounds": 2, "parameters": 10, "plants": [row], "curve": [0.5, None],
        "rounds_to": {"0.92": 2, "0.98": None}, "final_vs_best": 0.889, **dict.fromkeys(learning.KEYS, 0.9),
        **row,
    }  # fmt: skip
    run_["final_vs_best"] = 0.889
    text = learning.page({"tiles": [run_]})
    assert "**Misses by 0.111**: all data in one place is better. In the weakest run it loses at p." in text
    assert "`tundish simulate tests/tasks/tiles.toml --data tiles.npz --rounds 2 --seed SEED --json`" in text
    assert "0.92: 2, 0.98: -" in text
    better = {**run_, "final_vs_best": 1.02}
    assert "`final` is 1.020 of the better" in learning.page({"tiles": [better]})


def test_sections_that_are_made_by_themselves_stay_when_the_page_is_made_anew() -> None:
    page = "# What\n\ntable\n\n## one\n\ntext\n"
    titles = list(learning._ENDS)[:2]
    mixed, exact = (f"{title}\n\nx\n\n{learning._ENDS[title]}" for title in titles)
    both = learning.with_sections(page, dict(zip(titles, (mixed, exact), strict=True)))
    assert both == f"# What\n\ntable\n\n{mixed}\n\n{exact}\n\n## one\n\ntext\n"
    assert [learning.kept(both, title) for title in titles] == [mixed, exact]
    again = learning.with_sections(both, {titles[0]: mixed.replace("x", "y"), titles[1]: ""})
    assert again == f"# What\n\ntable\n\n{mixed.replace('x', 'y')}\n\n## one\n\ntext\n"
    assert learning.kept(page, titles[0]) == ""


def test_what_compression_costs_is_told_in_points_and_of_an_rmse_in_per_cent() -> None:
    sent = {"bytes_up_per_update": 500.0, "ratio_up": 100.0}
    pairs = [({"metric": "auroc", "final": 0.8 + n / 100, **sent}, {"final": 0.81}) for n in (0, 2)]
    rmse = [({"metric": "rmse", "final": 5.5, **sent}, {"final": 5.0})]
    text = learning.exact({"tiles": pairs, "nox": rmse}, 24)
    assert "| tiles | auroc | 0.81 | 0.81 | +0.0 ± 1.0 | +1.0, -1.0 | 500 | 100 |" in text
    assert "| nox | rmse | 5 | 5.5 | +10.0 | +10.0 | 500 | 100 |" in text
    assert "--json --codec float32`" in text
    text = learning.exact({"tiles": pairs}, 24, learning._SUMS)
    assert "| tiles | auroc | 0.81 | 0.81 | +0.0 ± 1.0 | +1.0, -1.0 | 500 | 100 |" in text
    assert "--json --privacy secure-aggregation`" in text


def test_pictures_are_learnt_and_judged_by_auroc(tmp_path: Path) -> None:
    x, y = pictures(240, 12, 12)
    found = run(save(tmp_path / "p.npz", x, y, np.arange(240) % 2), rounds=8)
    assert found["metric"] == "auroc"
    assert found["final"] > 0.8


def test_pictures_that_are_not_square_get_a_margin(tmp_path: Path) -> None:
    x, y = pictures(60, 12, 20)
    data = save(tmp_path / "p.npz", x, y, np.arange(60) % 2)
    task = parse_task(complete_task(TASK, data))
    assert (task.net, task.window.length, task.normalise) == ("cnn2d", 400, "window")
    site = load_sites(task, data)[0]
    folded = site.test.x.reshape(-1, 20, 20)
    np.testing.assert_array_equal(folded[0, :12], x[0, 0])
    np.testing.assert_array_equal(folded[0, 12:], np.repeat(x[0, 0, -1:], 8, 0))


def rows(count: int = 120) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    x = RANDOM.normal(size=(count, 4)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)


def test_odd_plants_of_one_set(tmp_path: Path) -> None:
    """Plant by plant what somebody may bring: one class, a class missing, no numbers, one sample, nothing at all."""
    x, y = rows(400)
    client = np.arange(400) // 3 % 4
    y[client == 0] = 0
    y[(client == 1) & (x[:, 1] > 1)] = 2
    y[1] = 3  # the only one of its class
    x[client == 2, 3] = np.nan
    x[::7, 2], x[::5, 1] = np.inf, np.nan
    client[301:306] = np.arange(5, 10)  # plants of one sample, some for the test alone
    client[310] = 12
    found = run(save(tmp_path / "odd.npz", x, y, client), rounds=2)
    assert found["metric"] == "accuracy"
    assert found["final"] > 0.5
    assert found["worst_plant_vs_alone"] is not None
    names = [row["plant"] for row in found["plants"]]
    assert {"0", "1", "2", "3"} < set(names)
    assert "4" not in names  # nobody's


def test_numbers_that_do_not_move_or_are_none(tmp_path: Path) -> None:
    x, _ = rows()
    y, client = x[:, 0].copy(), np.arange(120) // 3 % 2
    y[client == 1], y[::4] = 4, np.nan
    found = run(save(tmp_path / "odd.npz", x, y, client))
    assert found["metric"] == "rmse"
    assert np.isfinite(found["final"])


def test_labels_that_are_all_the_same_make_an_anomaly_task(tmp_path: Path) -> None:
    x, y = rows()
    found = run(save(tmp_path / "odd.npz", x, np.ones_like(y), np.arange(120) // 3 % 2))
    assert found["metric"] == "auroc"
    assert found["final"] is None  # without an anomaly in the test there is no such figure


@pytest.mark.parametrize("shape", [(3, 300), (3, 9, 9)], ids=["waveforms", "pictures"])
def test_several_channels_of_a_rare_fault(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x, y = RANDOM.normal(size=(60, *shape)).astype(np.float32), np.zeros(60, np.int64)
    y[[1, 12, 13, 33]] = 1
    found = run(save(tmp_path / "odd.npz", x, y, np.arange(60) // 3 % 2))
    assert found["metric"] == "auprc"
    assert found["parameters"] < 150_000


def test_fifty_plants(tmp_path: Path) -> None:
    x, y = rows(600)
    found = run(save(tmp_path / "many.npz", x, y, np.arange(600) // 3 % 50))
    assert len(found["plants"]) == 50


def test_labels_that_are_no_classes_are_named(tmp_path: Path) -> None:
    x, y = rows()
    with pytest.raises(UserError, match="y_train: label -1 is none of the 2 classes; number the classes from 0"):
        run(save(tmp_path / "odd.npz", x, y * 2 - 1, np.zeros(120, np.int64)))


def good() -> dict[str, NDArray[Any]]:
    x, y = rows(24)
    parts: dict[str, NDArray[Any]] = {"x": x, "y": y, "client": np.arange(24) % 2}
    return {f"{key}_{part}": value.copy() for part in ("train", "test") for key, value in parts.items()}


def short(arrays: dict[str, NDArray[Any]], key: str) -> None:
    arrays[key] = arrays[key][:-1]


def put(arrays: dict[str, NDArray[Any]], key: str, value: Any, at: Any = ...) -> None:
    """Put a value at a place of an array, or in the place of it."""
    if at is ...:
        arrays[key] = value
    else:
        arrays[key][at] = value


def none_to_train(arrays: dict[str, NDArray[Any]]) -> None:
    arrays.update({key: value[:0] for key, value in arrays.items() if key.endswith("_train")})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: a.pop("client_test"), "client_test: missing; give"),
        (lambda a: short(a, "y_train"), r"y_train: is \(23,\), and x_train has 24 samples; give one value for each"),
        (lambda a: short(a, "client_test"), r"client_test: is \(23,\), and x_test has 24 samples"),
        (lambda a: put(a, "group_train", np.arange(5)), r"group_train: is \(5,\), and x_train has 24 samples"),
        (
            lambda a: put(a, "x_test", np.zeros((24, 3))),
            r"x_test: is \(24, 3\), and x_train is \(24, 4\); give numbers",
        ),
        (lambda a: put(a, "x_train", np.zeros(24)), r"x_train: is \(24,\); give numbers: \(N, C, T\)"),
        (lambda a: put(a, "x_train", np.full((24, 4), "1.5")), "x_train: values of type <U3; give numbers"),
        (lambda a: put(a, "y_train", np.full(24, "worn")), "y_train: labels of type <U4; number the classes from 0"),
        (lambda a: put(a, "y_test", np.full(24, None)), "y_test: can't be read as a recorded set; give a whole .npz"),
        (none_to_train, r"x_train: is \(0, 4\): nothing is in it; give numbers"),
        (
            lambda a: put(a, "client_train", -1, 3),
            "client_train: 1 samples of plants that are none, such as -1; number",
        ),
        (
            lambda a: put(a, "client_names", np.array(["lyon"])),
            "client_names: names 1 plants, and client_train has plant 1; name every plant, from 0 on",
        ),
        (
            lambda a: put(a, "client_names", np.array(["lyon", "lyon"])),
            "client_names: 'lyon' is named 2 times; name each plant once",
        ),
        (lambda a: put(a, "x_train", np.full((24, 4), np.nan)), "x_train: holds no number, only NaN; give numbers"),
        (lambda a: put(a, "client_train", 1 << 40, 0), "client_train: 1 samples of plants .* such as 1099511627776"),
        (lambda a: put(a, "client_train", np.zeros(24)), "client_train: plants of type float64; number the plants"),
    ],
)
@pytest.mark.parametrize("pictures_too", [True, False], ids=["simulate", "demo"])
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, spoil: Any, said: str, *, pictures_too: bool) -> None:
    """Both ways into a file say it, and neither drops a sample without a word."""
    arrays = good()
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    assert data_layout(tmp_path / "d.npz", pictures=pictures_too).channels == 4
    spoil(arrays)
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said) as error:
        data_layout(tmp_path / "d.npz", pictures=pictures_too)
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_off_or_damaged_anywhere_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, **good())  # type: ignore[arg-type]
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="can't be read as a recorded set"):
            read_recorded(path)
    for at in range(40, len(whole) // 2, 41):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(UserError):  # no field of a zip's local headers must be right
            read_recorded(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UserError, match="can't be read as a recorded set"):
        read_recorded(tmp_path / "one.npy")


@pytest.mark.parametrize("command", [["simulate", "task.toml"], ["demo"]], ids=["simulate", "demo"])
def test_the_command_says_it_in_one_line(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task.toml").write_text(TASK)
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 and no more")
    out = ["--out", str(tmp_path / "out")] if command[0] == "demo" else []
    words = [word.replace("task.toml", str(tmp_path / "task.toml")) for word in command]
    assert main([*words, "--data", str(tmp_path / "d.npz"), *out]) == 2
    assert re.fullmatch(r"tundish: .*d\.npz: can't be read as a recorded set; .*\n", capsys.readouterr().err)


def test_a_holdout_is_of_whole_groups_and_of_every_class(tmp_path: Path) -> None:
    x, y = rows()
    task = parse_task(complete_task(TASK, save(tmp_path / "d.npz", x, y, np.zeros(120, np.int64))))
    labels = np.repeat([0.0, 1.0, 1.0, 0.0], 30).astype(np.float32)
    groups = np.arange(120) // 3
    held = carve(labels, groups, task)
    assert not set(groups[held]) & set(groups[~held])
    assert np.bincount(labels[held].astype(int)).tolist() == [12, 12]
    np.testing.assert_array_equal(held, carve(labels, groups, task))
    # Two groups are too few to give one away: stretches of each class are taken instead.
    few = carve(labels, np.arange(120) // 60, task)
    assert np.bincount(labels[few].astype(int)).tolist() == [12, 12]
    rare = np.zeros(120, np.float32)
    rare[7] = 1
    assert not carve(rare, None, task)[7]  # the only sample of a class is learnt
    assert not carve(np.zeros(1, np.float32), None, task).any()


@pytest.mark.parametrize("path", TASKS, ids=[path.stem for path in TASKS])
def test_each_recorded_set_is_read(path: Path) -> None:
    data = RECORDED / path.stem / f"{path.stem}.npz"
    if not data.exists():
        pytest.skip(f"no recorded data at {data}; TUNDISH_RECORDED names its folder")
    task = parse_task(complete_task(path.read_text(), data))
    sites = load_sites(task, data)
    metrics = {
        "ai4i2020": "auprc",
        "cmapss": "rmse",
        "gasturbine_nox": "rmse",
        "magnetic_tile": "auroc",
        "skab": "auroc",
    }
    assert metric_of(task, sites) == metrics.get(path.stem, "accuracy")
    for site in sites:
        assert 0.1 < len(site.holdout) / (len(site.train) + len(site.holdout)) < 0.21
