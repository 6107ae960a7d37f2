"""Who carries files between a staged aggregator and its first gateway, which reaches no broker."""

from typing import TYPE_CHECKING

from broker import stick, topics
from broker.messages import Birth, Death, Signer
from edge.cli import main
from edge.lab.processes import free_port
from edge.lab.stage import FEDERATION, gateway_path

if TYPE_CHECKING:
    from tests.test_agent import Plant

PATH = topics.GatewayPath.parse(gateway_path(0))


class Carrier:
    """`down` brings what the aggregator says, `export` and `import_` what the gateway says."""

    def __init__(self, p: "Plant") -> None:
        """Cut the gateway off, while the aggregator runs; another one, which sends nothing, lets a round open."""
        self._p, folder = p, p.stage.folder
        self._other, there = Signer.generate(), topics.GatewayPath.parse(gateway_path(1))
        self._there = topics.Status(there).topic
        birth = Birth(1, 5, 5, self._other.public_key, "test", (p.stage.scenario.task,))
        p.publish(self._there, self._other.seal(birth, self._there), retain=True)
        p.until(lambda: p.aggregator().get("state") == "open", gateway=False)
        self.toml, key = folder / "plant1" / "gateway.toml", p.aggregator_status()["public_key"]
        alone = self.toml.read_text().replace(f":{p.stage.mqtt_port}", f":{free_port()}")
        self.toml.write_text(f'{alone}\n[federation]\nname = "{FEDERATION}"\nkey = "{key}"\n')
        config = folder / "aggregator" / "federation.toml"
        self._office = ["-c", str(config), "--state", str(p.stage.aggregator_state)]
        self._cell = ["-c", str(self.toml), "--state", str(p.stage.gateway_state(0))]
        self._models, self._updates = folder / "cell.models", folder / "cell.updates"

    def start(self) -> None:
        """Start the gateway and its machine, and enrol it."""
        for process in (*self._p.stage.plcs, self._p.gateway):
            process.start()
        self._p.until(lambda: "public_key" in self._p.status())
        key = str(self._p.status()["public_key"])
        assert main(["broker", "enrol", *self._office, "--path", str(PATH), "--key", key]) == 0

    def down(self) -> None:
        assert main(["broker", "export", *self._office, "--path", str(PATH), str(self._models)]) == 0
        assert main(["edge", "import", str(self._models), *self._cell]) == 0

    def export(self) -> stick.Messages:
        """Return what is in the file."""
        assert main(["edge", "export", *self._cell, "--updates", str(self._updates)]) == 0
        return stick.read(self._updates)

    def import_(self) -> None:
        assert main(["broker", "import", *self._office, str(self._updates)]) == 0

    def goes_alone(self) -> None:
        """Let the other gateway leave."""
        self._p.publish(self._there, self._other.seal(Death(1, 5), self._there))
