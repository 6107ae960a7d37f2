"""The simulated spindle: published bearing kinematics, determinism, balance, and plants that differ."""

from itertools import islice

import numpy as np
import pytest

from edge.lab import physics
from edge.lab.physics import FEATURES, Geometry, Row, Spindle, orders


def rows(seed: int, plant: int, count: int, rate_hz: float = 50.0) -> list[Row]:
    return list(islice(Spindle(seed, plant, rate_hz).rows(), count))


@pytest.mark.parametrize(
    ("geometry", "bpfo", "bpfi", "bsf", "ftf"),
    [
        # Case Western Reserve University: SKF 6205-2RS JEM (drive end), 6203-2RS JEM (fan end); its "rolling element"
        # figures, 4.7135 and 3.9874, are of two strokes a spin.
        (Geometry(9, 7.94, 39.04), 3.5848, 5.4152, 4.7135 / 2, 0.39828),
        (Geometry(8, 6.746, 28.499), 3.0530, 4.9469, 3.9874 / 2, 0.3817),
    ],
)
def test_characteristic_rates_of_published_bearings(
    geometry: Geometry, bpfo: float, bpfi: float, bsf: float, ftf: float
) -> None:
    assert orders(geometry) == pytest.approx((bpfo, bpfi, bsf, ftf), rel=1e-3)


def test_rates_add_up() -> None:
    geometry = Geometry(12, 9.53, 46.0, 15.0)
    rates = orders(geometry)
    assert rates.bpfo + rates.bpfi == pytest.approx(geometry.balls)
    assert rates.ftf * geometry.balls == pytest.approx(rates.bpfo)


def test_rows_are_determined_by_seed_and_plant() -> None:
    def plain(found: list[Row]) -> list[object]:
        return [row._replace(waveform=None if row.waveform is None else row.waveform.tobytes()) for row in found]  # type: ignore[arg-type]

    assert plain(rows(1, 0, 60)) == plain(rows(1, 0, 60))
    assert plain(rows(1, 0, 60)) != plain(rows(2, 0, 60))
    assert plain(rows(1, 0, 60)) != plain(rows(1, 1, 60))


def test_a_life_runs_from_new_to_repair() -> None:
    found = rows(3, 0, 1200)
    assert [row.step for row in found] == list(range(1200))
    serials = [row.serial for row in found]
    assert serials == sorted(serials)
    assert serials[-1] >= 4
    for serial in range(1, serials[-1]):
        life = [row for row in found if row.serial == serial]
        running = [row for row in life if row.running]
        stopped = [row for row in life if not row.running]
        assert len(stopped) == 25
        assert all(row.condition == 0 for row in stopped)
        assert running[0].condition == 0
        assert running[-1].condition != 0
        assert len({row.condition for row in running}) == 2
        line = ("env_bpfo", "env_bpfi", "env_bsf")[running[-1].condition - 1]
        healthy = np.median([getattr(row, line) for row in running if not row.condition])
        assert max(getattr(row, line) for row in running if row.condition) > healthy + 6.0
    waves = [row.step for row in found if row.waveform is not None]
    assert waves == list(range(0, 1200, 50))
    wave = found[0].waveform
    assert wave is not None
    assert wave.dtype == np.float32
    assert wave.shape == (physics.SNAPSHOT,)


def test_the_envelope_line_of_the_faulty_race_stands_out() -> None:
    for kind, name in ((1, "env_bpfo"), (2, "env_bpfi"), (3, "env_bsf")):
        odds = (float(kind == 1), float(kind == 2), float(kind == 3))
        found = list(islice(Spindle(5, 1, 50.0, kinds=odds).rows(), 900))
        sick = [row for row in found if row.condition == kind]
        well = [row for row in found if row.condition == 0 and row.running]
        assert sick
        assert not [row for row in found if row.condition not in {0, kind}]
        rise = {
            n: np.mean([getattr(r, n) for r in sick]) - np.mean([getattr(r, n) for r in well]) for n in FEATURES[5:8]
        }
        assert max(rise, key=lambda n: rise[n]) == name


def test_plants_prefer_other_faults_and_differ_in_all_features() -> None:
    seen = []
    for plant in range(3):
        found = [row for row in rows(1, plant, 1600) if row.running]
        kinds = [row.condition for row in found if row.condition]
        assert np.mean([kind == plant % 3 + 1 for kind in kinds]) > 0.5
        seen.append(np.median(np.array([row[4:13] for row in found if not row.condition]), axis=0))
    assert (np.ptp(seen, axis=0) / np.mean(seen, axis=0) > 0.02).all()


def test_held_out_windows_are_balanced_and_of_other_bearings() -> None:
    x, y = physics.test_windows(4, 2, 50.0, 42, 32)
    assert x.shape == (42, len(FEATURES), 32)
    assert x.dtype == np.float32
    assert y.dtype == np.int64
    assert np.isfinite(x).all()
    assert np.bincount(y).tolist() == [11, 11, 10, 10]
    assert (x[:, FEATURES.index("current_a")] > 1.0).all()
    own = np.array([row[4:13] for row in rows(4, 2, 400)], np.float32)
    seen = {tuple(row) for row in own.tolist()}
    assert not seen & {tuple(row) for window in x for row in window.T.tolist()}
    again, labels = physics.test_windows(4, 2, 50.0, 42, 32)
    assert np.array_equal(x, again)
    assert np.array_equal(y, labels)
