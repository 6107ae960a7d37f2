"""A spindle whose bearing wears out, different at each plant: what the simulated PLC measures.

Kinematics of a rolling-element bearing with n balls of diameter d on a pitch circle D and contact angle a, in orders
of the shaft's speed (Randall and Antoni, "Rolling element bearing diagnostics: a tutorial", MSSP 25, 2011, section 2):

    cage (FTF)             (1 - d/D cos a) / 2
    outer race (BPFO)      n (1 - d/D cos a) / 2
    inner race (BPFI)      n (1 + d/D cos a) / 2
    ball spin (BSF)        D/(2d) (1 - (d/D cos a)^2)

A spall is struck at one of these rates (a ball's on either race, so twice a spin), with some slip. Each stroke rings a
structural resonance; the inner race carries its spall through the load zone once a turn, the ball once a turn of the
cage. Every row is what a condition monitor would report of a 50 ms snapshot: RMS, crest factor and the levels
of the envelope spectrum's lines at the bearing's rates.

A life is time-lapsed to seconds: a new bearing (serial + 1) runs well, a fault begins at some age and grows
exponentially, the machine stops for a repair. Which fault, how fast, how loud and how warm is the plant's own.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FEATURES = (
    "speed_rpm",
    "torque_pct",
    "current_a",
    "vib_rms",
    "crest",
    "env_bpfo",
    "env_bpfi",
    "env_bsf",
    "temp_c",
)
CONDITIONS = ("healthy", "outer", "inner", "ball")

SNAPSHOT = 512  # samples of one snapshot
SAMPLE_HZ = 10_240.0
_LEAD = 96  # samples before the snapshot, so that it may begin amid a ringing
_SIZE = 1024  # of the transforms
_THRESHOLD = 0.15  # the severity from which a fault is called one
_LEAST_G = 1e-3  # what the envelope's levels are relative to
_STILL_RPM = 30.0  # below it the drive is off
_BAND_HZ = (1_500.0, 4_800.0)  # of the envelope's band-pass


class Geometry(NamedTuple):
    """A bearing: number of balls, their diameter and the pitch diameter in mm, contact angle in degrees."""

    balls: int
    ball_mm: float
    pitch_mm: float
    angle_deg: float = 0.0


class Orders(NamedTuple):
    """The characteristic rates of a bearing in orders of the shaft's speed."""

    bpfo: float
    bpfi: float
    bsf: float
    ftf: float


class Row(NamedTuple):
    """What the PLC knows at one step. `waveform` is float32 (512,) in g once a second, None at the other rows."""

    step: int
    running: bool
    serial: int
    condition: int
    speed_rpm: float
    torque_pct: float
    current_a: float
    vib_rms: float
    crest: float
    env_bpfo: float
    env_bpfi: float
    env_bsf: float
    temp_c: float
    waveform: NDArray[np.float32] | None


class _Plant(NamedTuple):
    """What differs from plant to plant. Regimes are (rpm, load %); `kinds` the odds of outer, inner and ball."""

    geometry: Geometry
    regimes: tuple[tuple[float, float], ...]
    kinds: tuple[float, float, float]
    gain: float
    noise_g: float
    imbalance_g: float
    impact_g: float
    resonance_hz: float
    damping: float
    rated_a: float
    ambient_c: float


# 6205 and 6203 as Case Western Reserve University's bearing data centre gives them; the others are of like make.
_GEOMETRIES = (
    Geometry(9, 7.94, 39.04),
    Geometry(8, 6.746, 28.499),
    Geometry(10, 8.73, 48.0),
    Geometry(12, 9.53, 46.0, 15.0),
    Geometry(7, 8.0, 33.5),
)


def orders(geometry: Geometry) -> Orders:
    """Return the characteristic rates of a bearing, by the formulas above."""
    ratio = geometry.ball_mm / geometry.pitch_mm * math.cos(math.radians(geometry.angle_deg))
    half = geometry.balls / 2
    spin = geometry.pitch_mm / (2 * geometry.ball_mm) * (1 - ratio**2)
    return Orders(half * (1 - ratio), half * (1 + ratio), spin, (1 - ratio) / 2)


def _plant(number: int) -> _Plant:
    """Draw a plant by its number alone: the same machine for every seed."""
    random = np.random.default_rng((20_771, number))
    base = random.uniform(1_450.0, 2_300.0)
    regimes = tuple(
        (base * factor, load)
        for factor, load in zip(
            (1.0, random.uniform(1.15, 1.3), random.uniform(0.8, 0.92)),
            random.permutation([random.uniform(25, 45), random.uniform(50, 70), random.uniform(75, 95)]),
            strict=True,
        )
    )
    kinds = [0.07, 0.07, 0.07]
    kinds[number % 3] = 0.86
    return _Plant(
        geometry=_GEOMETRIES[number % len(_GEOMETRIES)],
        regimes=regimes,
        kinds=(kinds[0], kinds[1], kinds[2]),
        gain=random.uniform(0.7, 1.4),
        noise_g=random.uniform(0.09, 0.14),
        imbalance_g=random.uniform(0.08, 0.2),
        impact_g=random.uniform(1.3, 1.9),
        resonance_hz=random.uniform(2_300.0, 3_600.0),
        damping=random.uniform(0.05, 0.09),
        rated_a=random.uniform(12.0, 30.0),
        ambient_c=random.uniform(18.0, 30.0),
    )


class _Life:
    """One bearing: the kind of its fault (1 to 3), and its severity by age in rows."""

    def __init__(self, random: np.random.Generator, kinds: tuple[float, float, float], rows: float) -> None:
        self.rows = max(8, round(rows * random.uniform(0.75, 1.3)))
        self.kind = int(random.choice(3, p=kinds)) + 1
        self.onset = self.rows * random.uniform(0.2, 0.5)
        self.start = random.uniform(0.03, 0.07)
        self.end = random.uniform(0.7, 1.2)

    def severity(self, age: int) -> float:
        """Return 0 before the onset, then from about 0.05 exponentially to about 1 at the end."""
        if age < self.onset:
            return 0.0
        grown = (age - self.onset) / max(1.0, self.rows - self.onset)
        return self.start * float((self.end / self.start) ** grown)


class Spindle:
    """One plant's spindle; the same seed, plant and rate give the same rows.

    `life_s` is the mean life of a bearing in seconds of play, `kinds` replaces the plant's odds of the three faults.
    """

    def __init__(
        self,
        seed: int,
        plant: int,
        rate_hz: float,
        life_s: float = 4.0,
        kinds: tuple[float, float, float] | None = None,
    ) -> None:
        self.seed = seed
        self.plant = plant
        self.rate_hz = rate_hz
        self.life_s = life_s
        self._plant = _plant(plant)
        self._kinds = kinds or self._plant.kinds
        self.orders = orders(self._plant.geometry)
        self._ringing = _ringing(self._plant)
        self._band = _band()

    def rows(self) -> Iterator[Row]:
        """Yield rows for ever, one per 1/rate_hz seconds."""
        random = np.random.default_rng((self.seed, self.plant, 3))
        rate, plant = self.rate_hz, self._plant
        serial, age, repair = 1, 0, 0
        life = _Life(random, self._kinds, self.life_s * rate)
        regime, dwell = 0, 0
        speed, load, temp = plant.regimes[0][0], plant.regimes[0][1], plant.ambient_c + 20.0
        follow, warm = 1 - math.exp(-8.0 / rate), 1 - math.exp(-0.8 / rate)
        each_s = max(1, round(rate))
        step = 0
        while True:
            if dwell <= 0:
                regime = int(random.integers(len(plant.regimes)))
                dwell = round(rate * random.uniform(0.4, 1.2))
            dwell -= 1
            running = repair == 0
            speed_to, load_to = plant.regimes[regime] if running else (0.0, 0.0)
            speed += follow * (speed_to - speed)
            load += follow * (load_to - load)
            severity = life.severity(age) if running else 0.0
            heat = 0.28 * load + 6.0 * speed / 2_000 + 9.0 * severity
            temp += warm * (plant.ambient_c + heat - temp)
            wave = self._snapshot(random, speed / 60, life.kind, severity)
            measured = self._measure(random, wave, speed, load, temp)
            yield Row(
                step,
                running,
                serial,
                life.kind if severity >= _THRESHOLD else 0,
                *measured,
                wave.astype(np.float32) if step % each_s == 0 else None,
            )
            step += 1
            if running:
                age += 1
                if age >= life.rows:
                    repair = max(1, round(rate * 0.5))
            else:
                repair -= 1
                if repair == 0:
                    serial, age = serial + 1, 0
                    life = _Life(random, self._kinds, self.life_s * rate)
                    speed, load = plant.regimes[regime]

    def _snapshot(self, random: np.random.Generator, shaft_hz: float, kind: int, severity: float) -> Array:
        """Return float64 (512,), acceleration in g as the sensor gives it."""
        plant = self._plant
        wave = plant.noise_g * random.standard_normal(SNAPSHOT)
        phase = random.uniform(0.0, math.tau)
        turn = math.tau * shaft_hz / SAMPLE_HZ
        wave += plant.imbalance_g * (shaft_hz / 30.0) ** 2 * np.sin(turn * np.arange(SNAPSHOT) + phase)
        if severity > 0.0 and shaft_hz > 1.0:
            strokes = self._strokes(random, shaft_hz, kind, severity)
            wave += np.fft.irfft(np.fft.rfft(strokes, _SIZE) * self._ringing, _SIZE)[_LEAD : _LEAD + SNAPSHOT]
        return plant.gain * wave

    def _strokes(self, random: np.random.Generator, shaft_hz: float, kind: int, severity: float) -> Array:
        """Return float64 (608,): the impacts on the structure, in g, at the samples where they fall."""
        rates = self.orders
        rate_hz = shaft_hz * (rates.bpfo, rates.bpfi, 2 * rates.bsf)[kind - 1]
        length = _LEAD + SNAPSHOT
        gap = SAMPLE_HZ / rate_hz
        count = int(length / gap) + 1
        slip = 1.0 + 0.01 * random.standard_normal(count)
        at = random.uniform(0.0, gap) + np.concatenate(([0.0], np.cumsum(gap * slip)[:-1]))
        at = at[at < length]
        size = 1.0 + 0.15 * random.standard_normal(len(at))
        turn = math.tau * shaft_hz / SAMPLE_HZ
        phase = random.uniform(0.0, math.tau)
        if kind == CONDITIONS.index("inner"):
            size *= 1.0 + 0.8 * np.cos(turn * at + phase)
        elif kind == CONDITIONS.index("ball"):
            size *= (1.0 + 0.5 * np.cos(turn * rates.ftf * at + phase)) * np.where(np.arange(len(at)) % 2, 0.7, 1)
        strokes = np.zeros(length)
        np.add.at(strokes, at.astype(np.intp), severity * self._plant.impact_g * (shaft_hz / 30.0) * size)
        return strokes

    def _measure(
        self, random: np.random.Generator, wave: Array, speed: float, load: float, temp: float
    ) -> tuple[float, float, float, float, float, float, float, float, float]:
        """Return the nine features, in the order of FEATURES."""
        plant = self._plant
        noise = random.standard_normal(4)
        rms = math.sqrt(float(wave @ wave) / SNAPSHOT)
        peak = float(np.abs(wave).max())
        lines = self._lines(wave, speed / 60)
        return (
            max(0.0, speed + 4.0 * float(noise[0])),
            max(0.0, load + 1.5 * float(noise[1])),
            max(0.0, plant.rated_a * (0.25 + 0.0075 * load) * (speed > _STILL_RPM) + 0.15 * float(noise[2])),
            rms,
            peak / rms if rms > 0.0 else 0.0,
            *lines,
            temp + 0.2 * float(noise[3]),
        )

    def _lines(self, wave: Array, shaft_hz: float) -> tuple[float, float, float]:
        """Return the envelope's lines at BPFO, BPFI and BSF, each with its second harmonic, in dB over 1 mg."""
        spectrum = np.fft.rfft(wave, _SIZE) * self._band
        full = np.zeros(_SIZE, np.complex128)
        full[: len(spectrum)] = 2 * spectrum
        envelope = np.abs(np.fft.ifft(full)[:SNAPSHOT])
        envelope -= envelope.mean()
        magnitude = np.abs(np.fft.rfft(envelope * _HANN, 2 * _SIZE)) * (4 / SNAPSHOT)
        at = np.array([order * shaft_hz for order in self.orders[:3]]) * (2 * _SIZE / SAMPLE_HZ)
        found = np.interp(np.concatenate((at, 2 * at)), np.arange(len(magnitude)), magnitude)
        level = 20.0 * np.log10(np.maximum(found[:3] + found[3:], _LEAST_G) / _LEAST_G)
        return float(level[0]), float(level[1]), float(level[2])


_HANN = np.hanning(SNAPSHOT)


def _ringing(plant: _Plant) -> NDArray[np.complex128]:
    """Return the transform of the structure's answer to one stroke: a decaying sine at its resonance."""
    time = np.arange(_SIZE // 2) / SAMPLE_HZ
    omega = math.tau * plant.resonance_hz
    answer = np.exp(-plant.damping * omega * time) * np.sin(omega * math.sqrt(1 - plant.damping**2) * time)
    return np.fft.rfft(answer, _SIZE)


def _band() -> Array:
    hz = np.fft.rfftfreq(_SIZE, 1 / SAMPLE_HZ)
    return ((hz >= _BAND_HZ[0]) & (hz <= _BAND_HZ[1])).astype(np.float64)


def test_windows(
    seed: int, plant: int, rate_hz: float, count: int, length: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return held-out windows of a plant, balanced over the four conditions.

    x is float32 (count, 9, length) in the order of FEATURES, y int64 (count,), the condition at the last row. The
    bearings are others than those of `rows()` with the same seed, and all faults are alike likely. A window is
    all running and of one serial.
    """
    spindle = Spindle(seed + 1_000_003, plant, rate_hz, kinds=(1 / 3, 1 / 3, 1 / 3))
    wanted = [count // len(CONDITIONS) + (kind < count % len(CONDITIONS)) for kind in range(len(CONDITIONS))]
    found: list[list[NDArray[np.float32]]] = [[] for _ in CONDITIONS]
    recent: list[Row] = []
    since = 0
    for row in spindle.rows():
        if not row.running or (recent and recent[-1].serial != row.serial):
            recent.clear()
        if row.running:
            recent.append(row)
        since += 1
        kind = row.condition
        if len(recent) < length or since < length // 2 or len(found[kind]) >= wanted[kind]:
            continue
        since = 0
        del recent[:-length]
        start = Row._fields.index(FEATURES[0])
        found[kind].append(np.array([r[start : start + len(FEATURES)] for r in recent], np.float32).T)
        if all(len(have) >= want for have, want in zip(found, wanted, strict=True)):
            break
    x = np.stack([window for windows in found for window in windows])
    y = np.repeat(np.arange(len(CONDITIONS)), wanted).astype(np.int64)
    order = np.random.default_rng((seed, plant, 5)).permutation(count)
    return x[order], y[order]


# The name is this module's API; a test runner that collects by name must leave it alone.
test_windows.__test__ = False  # type: ignore[attr-defined]
