"""A Sparkplug edge node over paho; Google's protobuf makes its payloads from the field numbers of Tahu's proto."""

import threading
import time
from typing import Any

import paho.mqtt.client as paho
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from paho.mqtt.enums import CallbackAPIVersion

_TYPES = {"u32": 13, "u64": 4, "bool": 8, "str": 9, "float": 2, "double": 1, "bytes": 12}
_FIELDS: dict[str, list[tuple[str, int, str, bool]]] = {
    "PropertyValue": [("type", 1, "u32", False), ("is_null", 2, "bool", False), ("int_value", 3, "u32", False)],
    "PropertySet": [("keys", 1, "str", True), ("values", 2, "PropertyValue", True)],
    "Metric": [
        ("name", 1, "str", False),
        ("alias", 2, "u64", False),
        ("timestamp", 3, "u64", False),
        ("datatype", 4, "u32", False),
        ("is_historical", 5, "bool", False),
        ("is_transient", 6, "bool", False),
        ("is_null", 7, "bool", False),
        ("properties", 9, "PropertySet", False),
        ("int_value", 10, "u32", False),
        ("long_value", 11, "u64", False),
        ("float_value", 12, "float", False),
        ("double_value", 13, "double", False),
        ("boolean_value", 14, "bool", False),
        ("string_value", 15, "str", False),
        ("bytes_value", 16, "bytes", False),
    ],
    "Payload": [
        ("timestamp", 1, "u64", False),
        ("metrics", 2, "Metric", True),
        ("seq", 3, "u64", False),
        ("uuid", 4, "str", False),
        ("body", 5, "bytes", False),
    ],
}


def _payload_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="tests_sparkplug.proto", package="rig", syntax="proto2")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            added = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if kind in _TYPES:
                added.type = _TYPES[kind]
            else:
                added.type, added.type_name = 11, f".rig.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("rig.Payload"))


Payload = _payload_class()


class SparkplugNode:
    """Edge node `edge` of group `rig` with a device `dev`; its metrics have aliases, and names in births alone."""

    def __init__(self, port: int) -> None:
        self.metrics: dict[str, dict[str, Any]] = {}
        self.seq = 0
        self.births = 0
        self.up = threading.Event()
        self._lock = threading.Lock()
        self._bd_seq = 0
        self._port = port
        self.client = paho.Client(CallbackAPIVersion.VERSION2)

    def start(self) -> None:
        """Connect, with a death as the will, and be born."""
        self.client = paho.Client(CallbackAPIVersion.VERSION2)
        self._bd_seq += 1
        self.client.will_set("spBv1.0/rig/NDEATH/edge", self.death())
        self.client.on_connect = lambda client, *_: client.subscribe("spBv1.0/rig/NCMD/edge", 1)
        self.client.on_subscribe = self._subscribed
        self.client.on_message = self._command
        self.client.connect("127.0.0.1", self._port)
        self.client.loop_start()
        assert self.up.wait(20)

    def stop(self, *, cleanly: bool = True) -> None:
        """Leave; without a goodbye the broker sends the will."""
        self.up.clear()
        if cleanly:
            self.client.disconnect()
        else:
            self.client.socket().close()  # type: ignore[union-attr]
        self.client.loop_stop()

    def death(self) -> bytes:
        """What the will says: of which birth it is the death."""
        payload = Payload()
        payload.metrics.add(name="bdSeq", datatype=8, long_value=self._bd_seq)
        return bytes(payload.SerializeToString())

    def birth(self) -> None:
        """Publish NBIRTH and DBIRTH: names, aliases, types, values."""
        with self._lock:
            self.births += 1
            self.seq = -1
            self._send("NBIRTH", [{"name": "bdSeq", "datatype": 8, "long_value": self._bd_seq}])
            self._send("DBIRTH", [{"name": name} | metric for name, metric in self.metrics.items()])
            self.up.set()

    def data(self, name: str, kind: str = "DDATA", **more: Any) -> None:
        """Publish one metric by its alias."""
        with self._lock:
            self.metrics[name] |= more
            self._send(kind, [{k: v for k, v in self.metrics[name].items() if k != "datatype"}])

    def _send(self, kind: str, metrics: list[dict[str, Any]]) -> None:
        self.seq = (self.seq + 1) % 256
        now = time.time_ns() // 1_000_000
        payload = Payload(timestamp=now, seq=self.seq)
        for metric in metrics:
            payload.metrics.add(**{"timestamp": now} | metric)
        topic = f"spBv1.0/rig/{kind}/edge" + ("/dev" if kind[0] == "D" else "")
        self.client.publish(topic, payload.SerializeToString(), qos=0).wait_for_publish(5)

    def _subscribed(self, *_: Any) -> None:
        threading.Thread(target=self.birth).start()  # publishing waits for the thread that this is

    def _command(self, _client: Any, _userdata: Any, message: paho.MQTTMessage) -> None:
        asked = Payload.FromString(message.payload)
        if any(m.name == "Node Control/Rebirth" and m.boolean_value for m in asked.metrics):
            self._subscribed()
