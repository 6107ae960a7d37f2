"""Which folder is whose state: commands with a wrong one say so, and begin nothing new there."""

import asyncio
import sys
from contextlib import closing
from pathlib import Path

import pytest

from broker import alone, topics
from broker.config import load_federation
from broker.journal import Journal
from broker.messages import FederationBirth, Signer, peek
from broker.pki import Authority
from edge.cli import main
from tests.brokers import BrokerProcess
from tests.test_identity import HERE, Operator
from tests.test_service import Plant, broker, gateways, until

__all__ = ["broker"]

KEY = "ab" * 32
BROKER = [
    ["enrol", "--path", HERE, "--key", KEY],
    ["enrol", "--path", HERE, "--revoke"],
    ["enrol", "--path", HERE],
    ["acl", "--out", "mosquitto"],
    ["release", "--to", "canary"],
    ["rollback"],
    ["import", "cell.updates"],
    ["export", "--path", HERE, "cell.models"],
]


@pytest.mark.parametrize("command", BROKER, ids=" ".join)
@pytest.mark.parametrize("there", ["empty", "missing"])
def test_a_command_with_a_wrong_state_begins_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    office, wrong = Operator(tmp_path / "office"), tmp_path / "wrong"
    if there == "empty":
        wrong.mkdir()
    options = ["broker", *command, "-c", str(office.config), "--state", str(wrong)]
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"--state: no aggregator has its state in {wrong}; write the --state of tundish broker init and run" in err
    assert wrong.is_dir() == (there == "empty")
    assert not list(wrong.glob("*"))
    # Once the certificate says where the state is, so does the line; and neither `init` nor `run` begins another one.
    pki = Authority.create(tmp_path / "right" / "pki", "press-lines", ["localhost"]).folder
    tls = f'ca = "{pki}/ca.pem"\ncert = "{pki}/aggregator.pem"\nkey = "{pki}/aggregator.key"\n'
    office.config.write_text(office.config.read_text().replace('"mqtts://localhost"\n', f'"mqtts://localhost"\n{tls}'))
    for verb in (command, ["init"], ["run"]):
        assert main(["broker", *verb, *options[-4:]]) == 2
        assert capsys.readouterr().err.endswith(f"; write --state {tmp_path / 'right'}\n")
    assert not list(wrong.glob("*"))


def test_a_key_for_releases_needs_no_state(tmp_path: Path) -> None:
    office = Operator(tmp_path)
    assert main(["broker", "release", "--new-key", str(tmp_path / "k"), "-c", str(office.config), "--state", "no"]) == 0
    assert (tmp_path / "k").is_file()


async def test_a_second_federation_of_a_name_is_not_begun(broker: BrokerProcess, tmp_path: Path) -> None:
    """By the real command: a running aggregator, and one that is stopped, whose status outlives it."""
    plant, wrong = Plant(tmp_path, broker.url, min_gateways=1), tmp_path / "wrong"
    command = [sys.executable, "-m", "broker.cli", "run", "-c", str(plant.config), "--state", str(wrong)]
    topic = topics.FederationStatus("press").topic

    async def refused() -> str:
        child = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, err = await asyncio.wait_for(child.communicate(), 60)
        assert child.returncode == 2
        return err.decode().splitlines()[-1]

    with closing(Journal(plant.state)) as journal:
        key = journal.signer().public_key
    async with gateways(broker.url, 1) as there:
        async with plant.service():
            await until(lambda: topic in there[0].heard)
            says = f"{wrong} is new, but {broker.url} has federation press of the key {key.hex()}; write the --state"
            assert says in await refused()
            assert there[0].ups == 1
        said = there[0].heard[topic]
        await until(lambda: peek(said[-1], FederationBirth).state == "down")
        assert says in await refused()
        assert {peek(one, FederationBirth).public_key for one in said} == {key}
        # Nothing was made there that a later start takes for a federation's own.
        with closing(Journal(wrong)) as journal:
            assert not journal.has_tasks()
        # What nobody signed says nothing, and once nothing is retained, whoever asks is alone.
        for payload in (b"rubbish", b""):
            there[0].link.publish(topic, payload, retain=True)
            await until(lambda payload=payload: said[-1] == payload)  # type: ignore[misc]
            config, own = load_federation(plant.config), Signer.generate().public_key
            assert await alone.check_alone(config, wrong, own, lambda: False)
            assert not await alone.check_alone(config, wrong, own, lambda: True)
