"""Units: what converts, by which numbers, what is refused, and that nobody's text is evaluated."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.units import SAME, UnitError, conversion, known


# Values of NIST SP 811, appendix B, and of the definitions.
@pytest.mark.parametrize(
    ("given_", "wanted", "gain", "offset"),
    [
        ("bar", "psi", 14.503774, 0),
        ("degF", "degC", 5 / 9, -160 / 9),
        ("°C", "K", 1, 273.15),
        ("Cel", "[degF]", 1.8, 32),
        ("%", "1", 0.01, 0),
        ("m3/h", "L/min", 1000 / 60, 0),
        ("l/min", "m^3/s", 1 / 60_000, 0),
        ("N.m", "Nm", 1, 0),
        ("m/s2", "mm/s2", 1000, 0),
        ("kgf/cm2", "bar", 0.980665, 0),
        ("inH2O", "Pa", 249.0889, 0),
        ("U/min", "rpm", 1, 0),
        ("rpm", "rad/s", 0.10471976, 0),
        ("1/min", "Hz", 1 / 60, 0),
        ("µm", "mm", 0.001, 0),
        ("kWh", "MJ", 3.6, 0),
    ],
)
def test_what_converts(given_: str, wanted: str, gain: float, offset: float) -> None:
    there, back = conversion(given_, wanted), conversion(wanted, given_)
    assert there.gain == pytest.approx(gain, rel=1e-6)
    assert there.offset == pytest.approx(offset, rel=1e-6, abs=1e-9)
    assert (3.0 * there.gain + there.offset) * back.gain + back.offset == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("given_", "wanted", "says"),
    [
        ("bar", "degC", "'bar' (mass / length / time ** 2) is no 'degC' (temperature)"),
        ("rpm", "Hz", "'rpm' (1 / time) is no 'Hz' (1 / time)"),
        ("g", "m/s2", "'g' (mass) is no 'm/s2' (length / time ** 2)"),
        ("barg", "bar", "'barg' is no unit that the table knows"),
        ("bar", "furlongs/fortnite", "'furlongs/fortnite' is no unit that the table knows"),
        ("dBm", "mW", "'dBm' or 'mW' is logarithmic"),
        ("W", "dBm", "'W' or 'dBm' is logarithmic"),
        ("bar", "dB*bar", "'dB*bar' is no unit that the table knows"),
        ("%", "degC", "'%' (a plain number) is no 'degC' (temperature)"),
    ],
)
def test_what_does_not(given_: str, wanted: str, says: str) -> None:
    with pytest.raises(UnitError) as caught:
        conversion(given_, wanted)
    assert str(caught.value) == says


def test_what_is_written_alike_needs_no_table() -> None:
    code = (
        "import sys; from edge.units import SAME, conversion; assert conversion('barg', 'barg') == SAME; "
        "print('pint' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
    assert conversion("", "") == SAME


@pytest.mark.parametrize("text", ["9**9**9**9", "m**9999999999", "__import__('os')", "2 m", "(m", "a" * 9999, "m//s"])
def test_a_units_text_is_never_computed_with(text: str) -> None:
    assert not known(text)


@given(st.text(st.characters(codec="utf-8"), max_size=60) | st.text("m/s*^.1239-() kNCd[]", max_size=24))
def test_any_text_is_a_unit_or_is_refused(text: str) -> None:
    try:
        conversion(text, "bar")
    except UnitError:
        return
    assert known(text)
