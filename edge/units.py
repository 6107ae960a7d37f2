"""Units of measure: whether one is another's, and by which numbers. The table of units is pint's.

Common plant spellings are read beside pint's own names: UCUM's `Cel` and `[degF]`, powers without a sign (`m3/h`),
products with a point (`N.m`). A pair that is written alike needs no table at all, so pint is only loaded on a gateway
that has something to convert.
"""

import contextlib
import math
import re
from functools import cache
from typing import Any, NamedTuple

# What people and UCUM (https://ucum.org) write, and pint does not read.
_ALIASES = {
    "": "dimensionless",
    "1": "dimensionless",
    "Cel": "degC",
    "°C": "degC",
    "℃": "degC",
    "[degF]": "degF",
    "°F": "degF",
    "[psi]": "psi",
    "%": "percent",
    "[ppm]": "ppm",
    "Nm": "N*m",
    "U/min": "rpm",
    "r/min": "rpm",
    "rev/min": "rpm",
    "mH2O": "m_H2O",
}
_POWER = re.compile(r"(?<=[A-Za-zµ])(-?\d)(?!\w)")
_POINT = re.compile(r"(?<=[A-Za-z0-9µ])[.·](?=[A-Za-z])")
_ROTATION = re.compile(r"revolution|turn|radian|degree(?!_)|cycle")
# All that pint is given to evaluate: names and 1 with a one-digit power, joined by product and quotient.
_FACTOR = r"(?:1|[A-Za-zµΩ_]\w{0,40})(?:(?:\*\*|\^)-?\d)?"
_EXPRESSION = re.compile(rf"{_FACTOR}(?: ?[*/ ] ?{_FACTOR}){{0,7}}")


class Conversion(NamedTuple):
    """To the other unit: value * gain + offset."""

    gain: float = 1.0
    offset: float = 0.0


SAME = Conversion()


class UnitError(ValueError):
    """The units can't be one another's; the text says why."""


def conversion(given: str, wanted: str) -> Conversion:
    """Return how a value in `given` becomes one in `wanted`; UnitError if it can't, or if either is no unit.

    rpm and Hz are not taken for each other: whether a turn counts as 1 or as 2 pi is for whoever wires it to say.
    """
    if given == wanted:
        return SAME
    source, target = _parse(given), _parse(wanted)
    rotations = [bool(_ROTATION.search(str(unit))) for unit in (source, target)]
    if source.dimensionality != target.dimensionality or (rotations[0] != rotations[1]):
        raise UnitError(f"{given!r} ({_kind(source)}) is no {wanted!r} ({_kind(target)})")
    zero, one, ten = (_magnitude(value, source, target) for value in (0.0, 1.0, 10.0))
    if not math.isclose(ten - zero, 10 * (one - zero), rel_tol=1e-6):
        raise UnitError(f"{given!r} or {wanted!r} is logarithmic")
    return Conversion(one - zero, zero)


def known(unit: str) -> bool:
    """Whether a unit is in the table."""
    try:
        _parse(unit)
    except UnitError:
        return False
    return True


def _magnitude(value: float, source: Any, target: Any) -> float:
    """Convert one number; NaN, which is close to nothing, where the table can't (a product with decibels)."""
    import pint  # noqa: PLC0415

    try:
        found = float(_registry().Quantity(value, source).to(target).magnitude)
    except (pint.errors.PintError, ArithmeticError, AttributeError):
        return math.nan
    return found if math.isfinite(found) else math.nan


@cache
def _registry() -> Any:
    import pint  # noqa: PLC0415 - 15 MB and half a second, where there is something to convert

    return pint.UnitRegistry(cache_folder=None)


@cache
def _parse(text: str) -> Any:
    import pint  # noqa: PLC0415

    name = _ALIASES.get(text.strip(), text.strip())
    for form in (name, _POWER.sub(r"**\1", _POINT.sub("*", name))):
        if _EXPRESSION.fullmatch(form):
            # ValueError: NaN is a number to it. A product with decibels fails when its dimension is asked for.
            with contextlib.suppress(pint.errors.PintError, AttributeError, ValueError):
                unit = _registry().Unit(form)
                if unit.dimensionality is not None:
                    return unit
    raise UnitError(f"{text!r} is no unit that the table knows")


def _kind(unit: Any) -> str:
    """Name a dimension for people."""
    return re.sub(r"[\[\]]", "", str(unit.dimensionality)) if unit.dimensionality else "a plain number"
