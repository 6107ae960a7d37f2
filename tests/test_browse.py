"""`tundish edge browse` against both servers: what it lists, what it skips and why, and that its CSV is a tags file."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asyncua import ua

from edge.cli import main
from edge.config import load_config
from edge.drivers._opcua_browse import clean
from edge.drivers._opcua_pki import own_identity
from edge.lab.processes import free_port
from tests.opcua_rigs import PASSWORD, USER, AsyncuaPlant, NodePlant, Plant, install_node

GATEWAY = """\
[gateway]
path = "acme/lyon/press/line4/cell2"
[mqtt]
url = "mqtt://127.0.0.1:1883"
[[source]]
name = "plc1"
driver = "opcua"
url = "{url}"
tags = "plc1.csv"
"""
MANY = 2500  # children of one folder: more than fit one answer


class Thread:
    """An event loop for the servers: the command has one of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(90)


@pytest.fixture(scope="module")
def loop() -> Iterator[Thread]:
    thread = Thread()
    yield thread
    thread.loop.call_soon_threadsafe(thread.loop.stop)
    thread.thread.join()


async def furnish(plant: Plant) -> None:
    """What a PLC may have, the same on both servers."""
    await plant.add("Temp", 21.5, range=[0, 200], unit="degree_celsius")
    await plant.add("Count", 3)
    await plant.add("Name", "part 7")
    await plant.add("Wave", [0.0, 1.0, 2.0])
    await plant.add("Words", ["a", "b"])
    await plant.add("=a b/c", 1.0)


async def furnish_more(plant: AsyncuaPlant) -> None:
    """What only asyncua's server can be made to have: a cycle, a method, a matrix, a structure, two of one name."""
    assert plant.server is not None
    objects, space = plant.server.nodes.objects, plant.space
    line = await objects.add_object(space, "Line")
    deep = await line.add_object(space, "Deep")
    await deep.add_variable(space, "Speed", 1.0)
    await deep.add_reference(line, ua.ObjectIds.Organizes)  # type: ignore[attr-defined]
    await line.add_variable(ua.NodeId(ua.String("first"), ua.Int16(space)), f"{space}:Twin", 1.0)
    await line.add_variable(ua.NodeId(ua.String("second"), ua.Int16(space)), f"{space}:Twin", 2.0)
    await line.add_method(space, "Start", lambda _parent: [])
    matrix = ua.Variant([[1.0, 2.0], [3.0, 4.0]], ua.VariantType.Double)
    await line.add_variable(space, "Matrix", matrix)
    await line.add_variable(space, "Limits", ua.Range(0.0, 1.0))
    await line.add_variable(ua.NodeId(ua.String("two\nlines"), ua.Int16(space)), f"{space}:Odd", 1.0)


@pytest.fixture(params=["asyncua", "node-opcua"], scope="module")
def plant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, loop: Thread) -> Iterator[Plant]:
    folder = tmp_path_factory.mktemp("server")
    made: Plant
    if request.param == "asyncua":
        made = AsyncuaPlant(folder)
    else:
        assert request.config.cache is not None
        made = NodePlant(folder, install_node(request.config.cache.mkdir("node_opcua")))
    loop.run(made.start())
    loop.run(furnish(made))
    if isinstance(made, AsyncuaPlant):
        loop.run(furnish_more(made))
    yield made
    loop.run(made.stop())


def url(plant: Plant) -> str:
    return f"opc.tcp://127.0.0.1:{plant.port}"


def browse(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["edge", "browse", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_file_it_writes_is_a_tags_file(plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plc1.csv"
    found = browse(capsys, url(plant), "--write", str(file))
    (tmp_path / "gateway.toml").write_text(GATEWAY.format(url=url(plant)))
    assert main(["edge", "check", "-c", str(tmp_path / "gateway.toml")]) == 0
    tags = {tag.name: tag for tag in load_config(tmp_path / "gateway.toml").tags.values()}
    assert set(tags) == {row["tag"] for row in found["tags"]}
    assert tags["Temp"].address == "nsu=urn:rig;s=Temp"
    assert (tags["Temp"].type, tags["Name"].type) == ("float64", "string")
    assert tags["Count"].type in {"int32", "int64"}  # as each server has it
    assert (tags["Wave"].type, tags["Wave"].width) == ("float32[3]", 3)
    assert tags["a_b_c"].address == "nsu=urn:rig;s==a b/c"
    assert {row["tag"]: row["reason"] for row in found["skipped"]}["Words"] == "an array of String"
    assert found["complete"]
    if plant.knows_percent:
        assert tags["Temp"].unit == "°C"


def test_no_file_is_replaced_unasked(plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plc1.csv"
    file.write_text("mine")
    assert main(["edge", "browse", url(plant), "--write", str(file)]) == 2
    assert capsys.readouterr().err == f"tundish: --write: {file} exists; name another file, or add --force\n"
    assert file.read_text() == "mine"
    assert main(["edge", "browse", url(plant), "--write", str(file), "--force", "--filter", "Co*"]) == 0
    assert file.read_text(encoding="utf-8-sig").splitlines()[1].startswith("Count,nsu=urn:rig;s=Count,int")
    assert "1 tag written to" in capsys.readouterr().out
    assert main(["edge", "browse", url(plant), "--filter", "Coun"]) == 0
    assert "no tag found; --filter is compared with whole names, and * stands for anything" in capsys.readouterr().out


def test_cycles_end_and_what_can_be_no_tag_is_named(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    if not isinstance(plant, AsyncuaPlant):
        pytest.skip("asyncua's server alone has been furnished so")
    found = browse(capsys, url(plant), "--filter", "Line*")
    assert sorted(row["tag"] for row in found["tags"]) == ["Line.Deep.Speed", "Line.Twin", "Line.Twin_2"]
    reasons = {row["tag"]: row["reason"] for row in found["skipped"]}
    assert reasons == {
        "Line.Start": "a method",
        "Line.Matrix": "a matrix",
        "Line.Limits": "of type ExtensionObject",
        "Line.Odd": "its address does not go into one cell of a CSV",
    }
    listed = browse(capsys, url(plant), "--depth", "1", "--filter", "Line*")
    assert listed["tags"] == []
    below = browse(capsys, url(plant), "--node", listed["unopened"]["Line"], "--depth", "1")
    assert {"Twin", "Twin_2"} == {row["tag"] for row in below["tags"]}
    assert main(["edge", "browse", url(plant), "--depth", "1"]) == 0
    shown = capsys.readouterr().out
    assert "skipped Words: an array of String" in shown
    assert f"{len(listed['unopened'])} folders were not opened" in shown


def test_a_folder_larger_than_one_answer_comes_whole(
    plant: Plant, loop: Thread, capsys: pytest.CaptureFixture[str]
) -> None:
    if not isinstance(plant, NodePlant):
        pytest.skip("asyncua's server answers whole, without continuation points")
    loop.run(plant.tell("many", name="Big", count=MANY))
    found = browse(capsys, url(plant), "--filter", "Big.*")
    assert {row["tag"] for row in found["tags"]} == {f"Big.T{number}" for number in range(MANY)}


def test_a_secured_server_is_browsed_as_the_gateway(
    plant: Plant, loop: Thread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secure = [url(plant), "--security", "Basic256Sha256:SignAndEncrypt", "--filter", "Count"]
    assert main(["edge", "browse", *secure]) == 2
    assert "--state: certificates lie in the gateway's state folder; add --state DIR" in capsys.readouterr().err
    secure += ["--state", str(tmp_path)]
    assert main(["edge", "browse", *secure]) == 1
    assert "the server's certificate is not trusted" in capsys.readouterr().err
    (rejected,) = (tmp_path / "pki" / "rejected").iterdir()
    rejected.rename(tmp_path / "pki" / "trusted" / rejected.name)
    loop.run(plant.trust(own_identity(tmp_path / "pki").certificate))
    (tmp_path / "password").write_text(PASSWORD)
    found = browse(capsys, *secure, "--user", USER, "--password-file", str(tmp_path / "password"))
    assert [row["tag"] for row in found["tags"]] == ["Count"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["http://h"], 2, "URL: 'http://h' is not a opc.tcp URL; write opc.tcp://"),
        (["opc.tcp://h", "--depth", "0"], 2, "--depth: 0 is out of range"),
        (["opc.tcp://h", "--security", "Best"], 2, "--security: 'Best' is no policy and mode"),
        (["opc.tcp://h", "--user", "u", "--password-file", "/no"], 2, "--password-file: /no can't be read"),
        ([f"opc.tcp://127.0.0.1:{free_port()}"], 1, "refuses connections; check that the server runs"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/nonexistent")
    assert main(["edge", "browse", *arguments]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"tundish: {said}" if code == 2 else "tundish: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_node_that_is_none_or_of_no_namespace(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    for node, said in (("what?", "'what?' is not an OPC UA node"), ("nsu=urn:gone;i=1", "no namespace urn:gone")):
        assert main(["edge", "browse", url(plant), "--node", node]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_text_of_a_server_stays_text() -> None:
    assert clean('=cmd|"/c calc"!A1') == 'cmd|"/c calc"!A1'
    assert clean("two\nlines\x1b[31m") == "two lines [31m"
    assert len(clean("x" * 10_000)) < 300
