"""The pull-the-cable table: its page has the rows that the command knows, and a part of it holds on every run."""

from pathlib import Path

from tests.cable import ROWS, table

PAGE = (Path(__file__).parent.parent / "docs" / "cable.md").read_text()


def test_the_page_shows_every_row_of_the_command() -> None:
    lines = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ")][1:]
    shown = {(cells[0].removeprefix("| "), cells[1]) for cells in lines}
    assert shown == {(row, driver) for row, (drivers, _) in ROWS.items() for driver in drivers}


async def test_a_cut_and_a_restart() -> None:
    found = await table(["cut 1 s", "server restart"], ("opcua", "modbus"))
    assert {(one.row, one.driver) for one in found} == {
        (row, driver) for row in ("cut 1 s", "server restart") for driver in ("opcua", "modbus")
    }
    by = {(one.row, one.driver): one for one in found}
    # The server queues what the line does not carry; what a restart loses is said.
    assert by["cut 1 s", "opcua"].lost == 0
    assert "gaps" not in by["cut 1 s", "opcua"].told
    assert by["server restart", "opcua"].told.endswith("gaps 1")
    for driver in ("opcua", "modbus"):
        assert "10.0.0.10" in by["server restart", driver].told


async def test_what_somebody_must_mend_is_told_and_then_heals_by_itself() -> None:
    rows = ["server's certificate expired", "gateway's certificate expired"]
    for one in await table(rows, ("opcua",)):
        assert "certificate is expired since" in one.told
        assert one.seconds is not None
