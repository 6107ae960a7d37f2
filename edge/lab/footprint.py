"""`tundish bench footprint`: resident memory of a scoring gateway beside the floor, the same imports with nothing else.

The gateway is a real one: OPC UA and Modbus connected, MQTT connected, a model loaded and scoring, no training (its
round needs more gateways than there are). The floor is a second interpreter that imports what third-party and
standard modules the gateway has loaded, and does nothing with them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from edge.lab.processes import listens, wait_for
from edge.lab.stage import Scenario, Stage
from edge.train import resident_bytes
from models.errors import LocalError

_SCORED = 100
_WAIT_S = 120.0
_MB = 2**20
_OURS = ("edge", "broker", "models", "__main__", "__mp_main__")
# What a gateway loads to do its work: the agent, every driver it uses, its own command line.
_MODULES = "edge.cli edge.agent edge.config edge.drivers.opcua edge.drivers.modbus"
_LIST = f"""
import importlib, sys
for name in {_MODULES.split()!r}: importlib.import_module(name)
print(" ".join(sorted(sys.modules)))
"""
_FLOOR = """
import importlib, sys
for name in sys.argv[1:]:
    try: importlib.import_module(name)
    except ImportError: pass
print(int(open("/proc/self/statm").read().split()[1]) * __import__("resource").getpagesize())
"""


def _child(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LocalError(f"a child failed: {done.stderr.strip().rpartition(chr(10))[2]}")
    return done.stdout.strip()


def _floor() -> tuple[int, int]:
    """(resident bytes, modules) of an interpreter with the gateway's imports, ours left out."""
    names = [name for name in _child(_LIST).split() if name.partition(".")[0] not in _OURS]
    return int(_child(_FLOOR, *names)), len(names)


def _gateway() -> tuple[int, int]:
    """(resident bytes, windows scored) of a gateway at work."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Scenario(gateways=1, seed=0, rounds=None, min_gateways=2), Path(folder))
        try:
            stage.broker.start()
            wait_for("the broker", lambda: listens(stage.mqtt_port), [stage.broker], _WAIT_S)
            for process in (*stage.plcs, stage.aggregator, *stage.gateways):
                process.start()
            wait_for(
                "scores", lambda: int(str(stage.task_status(0).get("scored", 0))) >= _SCORED, stage.processes, _WAIT_S
            )
            sources = stage.status(0)["sources"]
            if not isinstance(sources, dict) or not all(health["connected"] for health in sources.values()):
                raise LocalError(f"not every source is connected: {sources}")
            scored = int(str(stage.task_status(0)["scored"]))
            return resident_bytes(stage.gateways[0].pid), scored
        finally:
            stage.stop()


def main(*, as_json: bool) -> int:
    """Measure and print."""
    resident, scored = _gateway()
    floor, modules = _floor()
    found = {
        "resident_mb": round(resident / _MB, 1),
        "floor_mb": round(floor / _MB, 1),
        "ratio": round(resident / floor, 3),
        "windows_scored": scored,
        "modules": modules,
    }
    if as_json:
        print(json.dumps(found))
    else:
        print(f"scoring gateway   {found['resident_mb']} MB resident after {scored} windows")
        print(f"imports alone     {found['floor_mb']} MB ({modules} modules)")
        print(f"ratio             {found['ratio']}")
    return 0
