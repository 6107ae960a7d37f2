"""Releases: metadata as the aggregator signs it, what a gateway takes of it, and who may attack it in vain."""

import asyncio
import itertools
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from broker import topics
from broker.channels import MAX_METADATA, Channel, Custom, target_of
from broker.config import ReleaseTable, load_federation
from broker.journal import Journal
from broker.messages import FirstRoot, ModelManifest, open_envelope
from broker.release import Repository, load_key, new_key
from broker.service import Service
from edge.cli import main
from edge.handback import Fetch
from edge.installer import check
from edge.releases import Releases
from edge.store import State
from models.errors import LocalError, PeerError, UserError
from models.spec import Alarm, Round
from tests.brokers import BROKERS, BrokerProcess, need_mosquitto
from tests.test_service import WAIT_S, Gateway, Plant, delta, gateways, open_plan, until

HERE, THERE = "acme/lyon/press/line4/cell2", "acme/lyon/press/line4/cell3"
DAY_MS = 86_400_000
COUNTER = itertools.count()


def now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)


class Office:
    """The aggregator's journal and the operators' keys, two of three of which must sign."""

    def __init__(self, folder: Path) -> None:
        self.files = [folder / f"key{i}" for i in range(3)]
        self.keys = tuple(new_key(path) for path in self.files)
        self.journal = Journal(folder / "state")
        self.table = ReleaseTable(keys=self.keys, threshold=2, canary=(HERE,))

    def repository(self, *signers: int, at_ms: int = 0) -> Repository:
        return Repository(self.journal, self.table, at_ms or now_ms(), [load_key(self.files[i]) for i in signers])

    def release(
        self, number: int, channel: Channel, *signers: int, version: int = 1, at_ms: int = 0
    ) -> dict[str, bytes]:
        repository = self.repository(*signers, at_ms=at_ms)
        names = [target_of(channel, "wear", path) for path in ([""] if channel == "stable" else self.table.canary)]
        said = {"custom": msgspec.to_builtins(Custom(number, version, "ab" * 32))}
        with self.journal.transaction():
            files = {name: TargetFile(8, {"sha256": f"{version:064x}"}, name, said) for name in names}
            repository.release(channel, "wear", files)
        return self.journal.metadata()

    def renew(self, *signers: int) -> dict[str, bytes]:
        repository = self.repository(*signers)
        with self.journal.transaction():
            repository.renew()
        return self.journal.metadata()

    def backup(self, folder: Path) -> Path:
        """Copy the journal, as nobody writes to it."""
        self.journal.close()
        copy = folder / "backup.db"
        shutil.copy(self.journal.path, copy)
        self.journal = Journal(self.journal.path.parent)
        return copy

    def restore(self, copy: Path) -> None:
        """Put that copy back."""
        self.journal.close()
        shutil.copy(copy, self.journal.path)
        self.journal = Journal(self.journal.path.parent)

    @property
    def online(self) -> CryptoSigner:
        """The key that whoever takes the aggregator over has."""
        return CryptoSigner(Ed25519PrivateKey.from_private_bytes(self.journal.signer("release").to_bytes()))


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    made = Office(tmp_path)
    yield made
    made.journal.close()


class Cell:
    """A gateway's own view of the releases."""

    def __init__(self, folder: Path, root: bytes, path: str = HERE) -> None:
        self.state = State(folder)
        self.releases = Releases(self.state, folder / "releases", path)
        asyncio.run(self.releases.pin(root))

    def sees(self, files: dict[str, bytes]) -> tuple[int, str, int] | None:
        """Release, channel and version that it is to score with, once these files have come."""
        for name, data in files.items():
            self.releases.take(name, data)
        found = self.releases.look(["wear", "other"])
        assert found.keys() <= {"wear"}
        if "wear" not in found:
            return None
        one = self.found = found["wear"]
        return one.release, one.channel, one.version


def cell(office: Office, tmp_path: Path, path: str = HERE) -> Cell:
    return Cell(tmp_path / f"cell{next(COUNTER)}", office.journal.metadata()["root1"], path)


def forged(data: bytes, change: Any, *signers: CryptoSigner) -> bytes:
    """Metadata changed, and signed anew with the keys that an attacker has."""
    made: Metadata[Any] = Metadata.from_bytes(data)
    change(made.signed)
    made.signatures.clear()
    for signer in signers:
        made.sign(signer, append=True)
    return made.to_bytes()


def consistent(office: Office, files: dict[str, bytes]) -> dict[str, bytes]:
    """Let snapshot and timestamp say what there is, as whoever has the online key can."""

    def snapshot(signed: Snapshot) -> None:
        for name, meta in signed.meta.items():
            data = files[name.removesuffix(".json")]
            meta.length, meta.hashes, meta.version = len(data), None, Metadata.from_bytes(data).signed.version
        signed.version += 1

    files = files | {"snapshot": forged(files["snapshot"], snapshot, office.online)}

    def timestamp(signed: Timestamp) -> None:
        signed.snapshot_meta.version += 1
        signed.snapshot_meta.length = signed.snapshot_meta.hashes = None
        signed.version += 1

    return files | {"timestamp": forged(files["timestamp"], timestamp, office.online)}


def test_a_model_goes_to_the_canaries_then_to_all_and_back(office: Office, tmp_path: Path) -> None:
    files = office.release(1, "canary", 0, 1, version=7)
    here, there = cell(office, tmp_path), cell(office, tmp_path, THERE)
    assert (here.sees(files), there.sees(files)) == ((1, "canary", 7), None)
    assert here.releases.in_force
    files = office.release(2, "stable", 1, 2, version=7)
    assert (here.sees(files), there.sees(files)) == ((2, "stable", 7), (2, "stable", 7))
    # The operators' keys are needed once: canaries go on without them.
    files = office.release(3, "canary", version=8)
    assert (here.sees(files), there.sees(files)) == ((3, "canary", 8), (2, "stable", 7))
    files = office.release(4, "stable", 0, 1, version=6)
    assert (here.sees(files), there.sees(files)) == ((4, "stable", 6), (4, "stable", 6))
    assert (here.releases.problem, there.releases.problem) == ("", "")
    assert here.sees({}) == (4, "stable", 6)  # of what it has verified before, too
    here.state.close()
    again = Releases(State(tmp_path / "again"), tmp_path, HERE)
    assert not again.in_force
    with closing(State(Path(here.releases._folder).parent)) as state:
        assert Releases(state, here.releases._folder, HERE).in_force


def test_files_may_come_in_any_order(office: Office, tmp_path: Path) -> None:
    files = office.release(1, "stable", 0, 1)
    for order in itertools.permutations(["timestamp", "snapshot", "targets", "stable"]):
        one = cell(office, tmp_path)
        assert one.sees({"canary": files["canary"]}) is None
        seen = [one.sees({name: files[name]}) for name in order]
        assert seen[:3] == [None] * 3
        assert seen[3] == (1, "stable", 1)
        assert one.releases.problem == ""


def test_too_few_keys_release_nothing(office: Office, tmp_path: Path) -> None:
    for signers in ((), (0,), (0, 0)):
        given, missing = len(set(signers)), ", ".join(sorted(set(office.keys) - {office.keys[i] for i in signers}))
        says = f"--key: too few: root needs 2 signatures by keys of [release], {given} given; "
        with pytest.raises(UserError, match=re.escape(says)) as caught:
            office.release(1, "stable", *signers)
        assert str(caught.value).endswith(f"; give --key FILE for {2 - given} more of: {missing}")
        assert office.journal.metadata() == {}
    before = office.release(1, "stable", 0, 1)
    with pytest.raises(UserError, match=r"too few: stable needs 2 signatures by keys of \[release\], 1 given"):
        office.release(2, "stable", 2)
    assert office.journal.metadata() == before
    # Nor does a gateway believe what the journal would not have stored.
    one = cell(office, tmp_path)
    assert one.sees(before) == (1, "stable", 1)

    def newer(signed: Targets) -> None:
        signed.version += 1
        signed.targets["stable/wear"].unrecognized_fields["custom"]["release"] = 9

    for forgers in ([office.online], [load_key(office.files[0])], [load_key(office.files[0]), office.online]):
        files = consistent(office, before | {"stable": forged(before["stable"], newer, *forgers)})
        one = cell(office, tmp_path)
        assert one.sees(files) is None
        assert "UnsignedMetadataError" in one.releases.problem
        assert "; too few keys known here signed it: ask the operator" in one.releases.problem
    both = [load_key(office.files[0]), load_key(office.files[2])]
    files = consistent(office, before | {"stable": forged(before["stable"], newer, *both)})
    assert one.sees(files) == (9, "stable", 1)


def test_metadata_of_the_journal_that_is_damaged_is_told(office: Office) -> None:
    good = office.release(1, "stable", 0, 1)
    for name in good:
        with office.journal.transaction():
            office.journal.put_metadata(name, good[name][:-9])
        with pytest.raises(LocalError, match=f"journal.db: the metadata '{name}' of releases is damaged .*; restore a"):
            office.release(2, "canary", 0, 1, at_ms=now_ms() + 200 * DAY_MS)
        with office.journal.transaction():
            office.journal.put_metadata(name, good[name])


def test_a_release_by_enough_keys_says_nothing_of_the_others(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        office.release(1, "stable", 0, 1)
    assert not caplog.text


def test_the_online_key_reaches_canaries_alone(office: Office, tmp_path: Path) -> None:
    files = office.release(1, "stable", 0, 1)
    here, there = cell(office, tmp_path), cell(office, tmp_path, THERE)

    def everybody(signed: Targets) -> None:
        said = {"custom": msgspec.to_builtins(Custom(99, 5, "cd" * 32))}
        for name in (target_of("canary", "wear", HERE), target_of("canary", "wear", THERE), "stable/wear"):
            signed.targets[name] = TargetFile(8, {"sha256": "ff" * 32}, name, said)
        signed.version += 1

    files = consistent(office, files | {"canary": forged(files["canary"], everybody, office.online)})
    assert here.sees(files) == (99, "canary", 5)
    assert there.sees(files) == (1, "stable", 1)

    def more(signed: Targets) -> None:
        assert signed.delegations
        assert signed.delegations.roles
        signed.delegations.roles["canary"].paths = ["canary/*/*/*/*/*/*"]
        signed.version += 1

    files = consistent(office, files | {"targets": forged(files["targets"], more, office.online)})
    assert there.sees(files) is None
    assert "targets was signed by 0/2 keys" in there.releases.problem


def test_freeze_expired_metadata_installs_nothing_new(office: Office, tmp_path: Path) -> None:
    old = office.release(1, "stable", 0, 1, at_ms=now_ms() - 8 * DAY_MS)
    one = cell(office, tmp_path)
    assert one.sees(old) is None
    assert one.releases.problem.startswith(
        "releases: ExpiredMetadataError: timestamp.json is expired; check this gateway"
    )
    with office.journal.transaction():
        assert office.repository().freshen()
    with office.journal.transaction():
        assert not office.repository().freshen()
    assert one.sees(office.journal.metadata()) == (1, "stable", 1)
    assert one.releases.problem == ""
    # What lets canaries go on ages too, and the operators' keys have to sign once in a year.
    with office.journal.transaction():
        assert office.repository(at_ms=now_ms() + 20 * DAY_MS).freshen()
    later = office.repository(0, 1, at_ms=now_ms() + 200 * DAY_MS)
    before = Metadata[Targets].from_bytes(office.journal.metadata()["stable"]).signed
    with office.journal.transaction():
        later.prepare()
    after = Metadata[Targets].from_bytes(office.journal.metadata()["stable"]).signed
    assert (after.version, after.targets) == (before.version + 1, before.targets)
    assert after.expires - before.expires > timedelta(days=199)
    assert "root2" in office.journal.metadata()


def test_a_channel_that_is_withheld_takes_no_canary_back(office: Office, tmp_path: Path) -> None:
    office.release(1, "canary", 0, 1)
    office.release(2, "stable", 0, 1, version=2)
    files = office.release(3, "stable", 0, 1, version=3)
    withheld = {name: data for name, data in files.items() if name != "stable"}
    assert cell(office, tmp_path).sees(withheld) is None
    mangled = cell(office, tmp_path)
    assert mangled.sees(files | {"stable": b"{}"}) is None
    assert mangled.releases.problem
    assert mangled.sees(files) == (3, "stable", 3)
    # A folder that can't be written to is a problem that is told, not the end of the gateway's loop.
    full = cell(office, tmp_path)
    full.releases._folder.parent.mkdir(exist_ok=True)
    full.releases._folder.write_bytes(b"")
    assert full.sees(files) is None
    assert "Error" in full.releases.problem
    assert full.releases.changed  # so it is looked at again
    full.releases._folder.unlink()
    assert full.sees({}) == (3, "stable", 3)
    assert not full.releases.changed


def test_rollback_older_metadata_is_not_taken(office: Office, tmp_path: Path) -> None:
    old = office.release(1, "stable", 0, 1)
    new = office.release(2, "stable", 0, 1, version=2)
    one = cell(office, tmp_path)
    assert one.sees(new) == (2, "stable", 2)
    assert one.sees(old) is None
    assert "BadVersionNumberError" in one.releases.problem
    # Not even with a timestamp and a snapshot of the one who has the online key.
    files = consistent(office, new | {"stable": old["stable"]})
    assert one.sees(files) is None
    assert "BadVersionNumberError" in one.releases.problem


def test_mix_and_match_files_of_two_releases_do_not_go_together(office: Office, tmp_path: Path) -> None:
    old = office.release(1, "stable", 0, 1)
    new = office.release(2, "canary", version=2)
    for name in ("snapshot", "canary"):
        one = cell(office, tmp_path)
        assert one.sees(new | {name: old[name]}) != (2, "canary", 2)
        assert one.releases.problem
        assert one.sees({name: new[name]}) == (2, "canary", 2)


def test_no_flipped_bit_and_no_part_of_a_file_is_taken(office: Office, tmp_path: Path) -> None:
    files = office.release(1, "stable", 0, 1)
    for name in ("timestamp", "snapshot", "targets", "stable"):
        data = files[name]
        one = cell(office, tmp_path)
        for at in range(0, len(data), 41):
            for broken in (data[:at], data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]):
                assert one.sees(files | {name: broken}) is None
        assert one.sees(files) == (1, "stable", 1)


def test_a_flood_is_bounded(office: Office, tmp_path: Path) -> None:
    files = office.release(1, "stable", 0, 1)
    one = cell(office, tmp_path)
    with pytest.raises(PeerError, match="at most 65536"):
        one.releases.take("timestamp", bytes(MAX_METADATA + 1))
    for name in ("root33", "root0", "root01", "7.root", "stable2", "x", "canary-"):
        with pytest.raises(PeerError, match="no metadata"):
            one.releases.take(name, b"{}")
    # Of metadata that says how long the next file is, no longer one is read.
    stable = json.loads(files["stable"])
    assert one.sees(files | {"stable": json.dumps(stable, indent=9).encode()}) is None
    assert "DownloadLengthMismatchError" in one.releases.problem
    deep = b'{"signed":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
    assert one.sees(files | {"timestamp": deep}) is None
    assert one.sees(files) == (1, "stable", 1)


def test_other_keys_take_over_where_those_before_say_so(office: Office, tmp_path: Path) -> None:
    office.release(1, "stable", 0, 1)
    one = cell(office, tmp_path)
    office.table = ReleaseTable(keys=(office.keys[2],), threshold=1, canary=(THERE,))
    before = r"root needs 2 signatures by keys that \[release\] had before this change, 1 given"
    for signers, says in (((2,), before), ((0, 1), r"root needs 1 signature by keys of \[release\], 0 given")):
        with pytest.raises(UserError, match=f"too few: {says}"):
            office.release(2, "stable", *signers)  # who is new can't say so alone, nor others without him
    files = office.release(2, "stable", 0, 2, version=2)
    assert one.sees(files) == (2, "stable", 2)
    files = office.release(3, "canary", version=3)
    assert one.sees(files) == (2, "stable", 2)
    assert cell(office, tmp_path, THERE).sees(files) == (3, "canary", 3)
    files = office.release(4, "stable", 2, version=4)
    assert one.sees(files) == (4, "stable", 4)
    assert one.releases.problem == ""


def worn_out(office: Office, files: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
    """What lets no later version in, as whoever has the online key can sign it: of each role that is signed by it."""
    most = 10**9

    def timestamp(signed: Timestamp) -> None:
        signed.version = most

    yield files | {"timestamp": forged(files["timestamp"], timestamp, office.online)}

    def version(signed: Targets | Snapshot) -> None:
        signed.version = most

    def canary(signed: Snapshot) -> None:
        signed.version, signed.meta["canary.json"] = most, MetaFile(most)

    def snapshot(signed: Timestamp) -> None:
        signed.version, signed.snapshot_meta = signed.version + 1, MetaFile(most)

    yield files | {
        "canary": forged(files["canary"], version, office.online),
        "snapshot": forged(files["snapshot"], canary, office.online),
        "timestamp": forged(files["timestamp"], snapshot, office.online),
    }


def test_from_a_stolen_online_key_gateways_go_on(office: Office, tmp_path: Path) -> None:
    office.release(1, "stable", 0, 1)
    before = office.release(2, "canary", version=2)
    thief, cells = office.online, [cell(office, tmp_path) for _ in range(2)]
    for one, bad in zip(cells, worn_out(office, before), strict=True):
        assert one.sees(before) == (2, "canary", 2)
        assert one.sees(bad) == (2, "canary", 2)
    office.release(3, "stable", 0, 2, version=2)
    files = office.release(4, "stable", 0, 2, version=3)
    for one in cells:
        assert one.sees(files) is None
        assert "BadVersionNumberError" in one.releases.problem
    for signers in ((), (0,)):
        with pytest.raises(UserError, match="too few: root needs 2 signatures"):
            office.renew(*signers)
    assert (office.journal.metadata(), office.online.public_key) == (files, thief.public_key)
    files = office.renew(0, 1)
    assert {name for name in files if name.startswith("root")} == {"root1", "root2"}
    assert office.online.public_key != thief.public_key
    for one in (*cells, cell(office, tmp_path)):
        assert one.sees(files) == (4, "stable", 3)
        assert one.releases.problem == ""
        # What is signed by the key before is nothing to those who have the new root, of whatever version.
        for version in (1, 99, 2**40):
            bad = json.loads(files["timestamp"])
            bad["signed"]["version"] = version
            assert one.sees({"timestamp": forged(json.dumps(bad).encode(), lambda _: None, thief)}) is None
            assert "UnsignedMetadataError" in one.releases.problem
        assert one.sees(files) == (4, "stable", 3)
    files = office.release(5, "canary", version=4)
    assert [one.sees(files) for one in cells] == [(5, "canary", 4)] * 2


def test_of_a_restored_journal_gateways_go_on(office: Office, tmp_path: Path) -> None:
    one, other = (office.release(1, "stable", 0, 1), cell(office, tmp_path))[1], cell(office, tmp_path)
    copy = office.backup(tmp_path)
    office.release(2, "stable", 0, 1, version=2)
    # A root that the copy knows nothing of: somebody else may go to the canaries, and the operators' keys were changed.
    office.table = msgspec.structs.replace(office.table, keys=office.keys[:2])
    files = office.release(3, "stable", 0, 1, version=3)
    assert "root2" in files
    assert one.sees(files) == (3, "stable", 3)
    office.restore(copy)
    assert "root2" not in office.journal.metadata()
    assert one.sees(office.renew(0, 1)) is None  # by a root2 of its own
    assert "UnsignedMetadataError" in one.releases.problem
    # One new root for each that was lost, and one more.
    assert one.sees(office.renew(0, 1)) == (1, "stable", 1)
    files = office.release(3, "stable", 0, 1, version=30)  # a number that was given before
    assert [each.sees(files) for each in (one, other)] == [(3, "stable", 30)] * 2
    assert (one.releases.problem, other.releases.problem) == ("", "")


def test_a_restored_journal_counts_lower_until_it_has_another_online_key(office: Office, tmp_path: Path) -> None:
    office.release(1, "stable", 0, 1)
    one, copy = cell(office, tmp_path), office.backup(tmp_path)
    for number in (2, 3):
        files = office.release(number, "stable", 0, 1, version=number)
    assert one.sees(files) == (3, "stable", 3)
    key = one.found.key
    office.restore(copy)
    assert one.sees(office.release(2, "stable", 0, 1, version=20)) is None
    assert "BadVersionNumberError" in one.releases.problem
    assert one.sees(office.renew(0, 1)) == (2, "stable", 20)
    assert one.found.key != key  # by which an installer knows that numbers begin anew
    one.state.close()


def test_a_key_is_its_owners_alone_and_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "release.key"
    key = new_key(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert load_key(file).public_key.keyval["public"] == key
    with pytest.raises(UserError, match="exists"):
        new_key(file)
    with pytest.raises(UserError, match="can be made"):
        new_key(tmp_path / "absent" / "key")
    for text in (b"", b"-----BEGIN PRIVATE KEY-----", file.read_bytes()[:60]):
        (tmp_path / "bad").write_bytes(text)
        with pytest.raises(UserError, match="is no key of releases"):
            load_key(tmp_path / "bad")
    with pytest.raises(UserError, match="No such file"):
        load_key(tmp_path / "absent")


def run(plant: Plant, *options: object) -> int:
    return main(["broker", *map(str, options), "-c", str(plant.config), "--state", str(plant.state)])


def told_in_one_line(plant: Plant, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What can't be released, or given again; version 1 is released, and 3 is the newest."""
    capsys.readouterr()
    other = plant.state / "other.key"
    public = new_key(other)
    wrong: list[tuple[list[object], int, str]] = [
        (["release"], 2, "--to: missing; write --to canary or --to stable"),
        (["release", "--to", "stable", "--task", "no"], 2, "--task: no task 'no'; write one of: wear"),
        (["release", "--to", "stable", "--version", 0], 2, "0 can't be released; newest that can be: 3, 2, 1"),
        (["rollback", "--to", 3, "--key", key], 2, "--to: version 3 was never released to stable; released were: 1;"),
        (["rollback", "--key", key], 2, "--to: nothing older than version 1 was released to stable; released were: 1;"),
        (["rollback", "--channel", "stable"], 2, "--to"),
        (
            ["release", "--new-online-key", "--key", key, "--to", "stable"],
            2,
            "--new-online-key: is for all tasks; leave",
        ),
        (
            ["release", "--new-online-key"],
            2,
            "--key: too few: root needs 1 signature by keys of [release], 0 given",
        ),
        (
            ["release", "--to", "stable", "--key", other],
            2,
            f"--key: {other} is none of [release] keys: its public key is {public}; write it there, or give the file",
        ),
    ]
    for options, code, says in wrong:
        assert run(plant, *options) == code
        assert says in (err := capsys.readouterr().err)
        assert err.count("\n") == 1


async def test_a_running_aggregator_publishes_what_another_online_key_signs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=1)
        key, prefix = tmp_path / "release.key", topics.ReleaseFile("press", "").topic
        renew = partial(run, plant, "release", "--new-online-key", "--key", key)
        assert renew() == 2
        assert "federation.toml: release: missing" in capsys.readouterr().err
        with plant.config.open("a") as file:
            file.write(f'[release]\nkeys = ["{new_key(key)}"]\n')
        assert renew() == 1
        assert "nothing is released yet" in capsys.readouterr().err
        async with gateways(broker.url, 1) as (g,), plant.service():
            g.link.subscribe(f"{prefix}+")
            g.send(await open_plan([g]), delta(1))
            await until(lambda: g.has(1))
            assert await asyncio.to_thread(run, plant, "release", "--to", "stable", "--key", key) == 0
            await until(lambda: f"{prefix}timestamp" in g.heard)
            assert await asyncio.to_thread(renew) == 0
            assert "the online key is" in capsys.readouterr().out
            await until(lambda: f"{prefix}root2" in g.heard)
            with closing(Journal(plant.state)) as journal:
                files, ledger = journal.metadata(), list(journal.ledger_lines())
            await until(lambda: all(g.heard.get(prefix + name, [b""])[-1] == data for name, data in files.items()))
    assert sum(json.loads(line)["kind"] == "release-key" for line in ledger) == 1
    # Without [release] it starts no more, and says what stood there.
    text = plant.config.read_text()
    begin = text.index("[release]")
    plant.config.write_text(text[:begin])
    with pytest.raises(UserError, match="missing, but models were released") as stop:
        await Service(load_federation(plant.config), plant.state).run()
    keys = text[begin:].splitlines()[1]
    assert str(stop.value).endswith(f"put it back as it was: {keys}, threshold = 1, canary = []")
    with closing(State(tmp_path / "cell")) as state:
        releases = Releases(state, tmp_path / "cell" / "releases", HERE)
        await releases.pin(files["root1"])
        for name, data in files.items():
            releases.take(name, data)
        assert releases.look(["wear"])["wear"].release == 1


async def test_an_aggregator_that_was_started_without_the_table_is_to_be_restarted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "the aggregator that runs was started without [release] and publishes none of this: restart it\n"
    with BrokerProcess("amqtt") as broker:
        plant, key = Plant(tmp_path, broker.url, min_gateways=1), tmp_path / "release.key"

        async def release(*options: str) -> str:
            assert await asyncio.to_thread(run, plant, "release", "--to", "stable", "--key", key, *options) == 0
            return capsys.readouterr().out

        async with gateways(broker.url, 1) as (g,):
            async with plant.service():
                g.send(await open_plan([g]), delta(1))
                await until(lambda: g.has(1) and plant.has_status())
                with plant.config.open("a") as file:
                    file.write(f'[release]\nkeys = ["{new_key(key)}"]\n')
                assert (await release()).endswith(says)
            assert says not in await release()  # it will know it at its start
            (plant.state / "status.json").unlink()
            async with plant.service():
                await until(plant.has_status)
                assert says not in await release()
                g.link.subscribe("_fl/press/_release/+")
                await until(lambda: "_fl/press/_release/timestamp" in g.heard)


async def test_what_others_write_sends_no_release_again(tmp_path: Path) -> None:
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=1, join="enrolled")
        key, prefix = tmp_path / "release.key", topics.ReleaseFile("press", "").topic
        with plant.config.open("a") as file:
            file.write(f'[release]\nkeys = ["{new_key(key)}"]\n')

        async def enrol(g: Gateway) -> None:
            """By another process's commit, of which the aggregator has heard once the gateway is there for it."""
            options = "--path", g.path, "--key", g.signer.public_key.hex()
            assert await asyncio.to_thread(run, plant, "enrol", *options) == 0
            await until(lambda: plant.status()["tasks"]["wear"]["gateways"].get(str(g.path), {}).get("online"))

        async with gateways(broker.url, 2) as (g, other), plant.service():
            g.link.subscribe(f"{prefix}+")
            await until(plant.has_status)
            await enrol(g)
            g.send(await open_plan([g]), delta(1))
            await until(lambda: g.has(1))
            release = partial(run, plant, "release", "--key", key, "--to")
            assert await asyncio.to_thread(release, "stable") == 0
            await until(lambda: f"{prefix}timestamp" in g.heard)
            await enrol(other)
            assert await asyncio.to_thread(release, "stable", "--version", 1) == 0
            await until(lambda: f"{prefix}targets" in g.heard and len(g.heard[f"{prefix}timestamp"]) > 1)
            with closing(Journal(plant.state)) as journal:
                newest = journal.metadata()["timestamp"]
            await until(lambda: g.heard[f"{prefix}timestamp"][-1] == newest)
            assert len(g.heard[f"{prefix}timestamp"]) == 2


async def retains(url: str, *versions: int) -> None:
    """Wait until a new client gets the weights of just these versions."""
    wanted = {topics.Chunk("press", "wear", version, "weights0").topic for version in versions}

    async def found() -> set[str]:
        late = Gateway(url, "late")
        late.link.start()
        try:
            await until(lambda: "_fl/press/status" in late.heard)
            return {topic for topic, said in late.heard.items() if "/weights" in topic and said[-1]}
        finally:
            await late.link.stop()

    async with asyncio.timeout(WAIT_S):
        while await found() != wanted:  # noqa: ASYNC110 - another process is waited for
            await asyncio.sleep(0.1)


@pytest.fixture(params=BROKERS)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "mosquitto":
        need_mosquitto()
    with BrokerProcess(request.param) as process:
        yield process.url


async def test_no_more_is_retained_than_what_gateways_may_be_fetching(url: str, tmp_path: Path) -> None:
    plant, key = Plant(tmp_path, url, min_gateways=1, rounds=7), tmp_path / "release.key"
    with plant.config.open("a") as file:
        file.write(f'[release]\nkeys = ["{new_key(key)}"]\ncanary = ["{THERE}"]\n')

    async def release(version: int, channel: Channel = "stable") -> None:
        options = "--to", channel, "--version", version, "--key", key
        assert await asyncio.to_thread(run, plant, "release", *options) == 0

    async with gateways(url, 1) as (g,), plant.service():
        for number in range(1, 8):
            g.send(await open_plan([g], number), delta(number))
            await until(partial(g.has, number))
            if number == 1:
                await release(1)
    async with plant.service():
        await retains(url, 1, 6, 7)
        await release(2, "canary")
        await release(3)
        await retains(url, 1, 2, 3, 6, 7)  # whoever is fetching the one before can end that
        await release(6)
        await retains(url, 2, 3, 6, 7)
        await release(4)
        await retains(url, 2, 4, 6, 7)  # what is the way to the newest model stays, released or not
    for version in (5, 3):  # while the aggregator is down
        await release(version)
    async with plant.service():
        await retains(url, 2, 3, 6, 7)


async def test_what_was_released_can_be_fetched_for_as_long_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=1, rounds=4)
        key, path = tmp_path / "release.key", "acme/lyon/press/line4/late"
        with plant.config.open("a") as file:
            file.write(f'[release]\nkeys = ["{new_key(key)}"]\ncanary = ["{path}"]\n')
        async with gateways(broker.url, 1) as (g,), plant.service():
            plan = await open_plan([g])
            assert await asyncio.to_thread(run, plant, "release", "--to", "stable", "--key", key) == 1
            for number in range(1, 4):
                g.send(plan, delta(number))
                plan = await open_plan([g], number + 1)
                if number == 1:
                    assert await asyncio.to_thread(run, plant, "release", "--to", "stable", "--key", key) == 0
                    assert await asyncio.to_thread(run, plant, "release", "--to", "canary", "--version", 1) == 0
            async with gateways(broker.url, 1) as (late,):
                topic, here = topics.Manifest("press", "wear", "stable").topic, topics.ReleaseFile("press", "+").topic
                late.link.subscribe(here)
                await until(lambda: {topic, here.replace("+", "timestamp"), "_fl/press/status"} <= late.heard.keys())
                manifest = open_envelope(late.heard[topic][-1], topic, late.key, ModelManifest)
                fetch = Fetch("press", "wear", manifest, None)
                while fetch.topics:
                    await until(lambda: fetch.topics[0] in late.heard)
                    assert fetch.take(fetch.topics[0], late.heard[fetch.topics[0]][-1])
                await until(lambda: "_fl/press/_release/first" in late.heard)
                prefix = here.removesuffix("+")
                files = {t.removeprefix(prefix): d[-1] for t, d in late.heard.items() if t.startswith(prefix)}
            numbers = {"stable": 1, "canary": 2}
            released = {of: {"release": number, "version": 1, "in_force": True} for of, number in numbers.items()}
            await until(lambda: plant.status()["released"] == {"wear": released})
            capsys.readouterr()
            assert await asyncio.to_thread(run, plant, "status") == 0
            assert "  wear: canary has release 2, version 1\n" in capsys.readouterr().out
        model, other = fetch.model(), plant.status()["tasks"]["wear"]["version"]
    assert (model.manifest.version, other) == (1, 3)
    first = open_envelope(files.pop("first"), f"{prefix}first", late.key, FirstRoot)
    with closing(State(tmp_path / "cell")) as state:
        releases = Releases(state, tmp_path / "cell" / "releases", path)
        await releases.pin(first.root)
        for name, data in files.items():
            releases.take(name, data)
        one = releases.look(["wear"])["wear"]
    assert (one.release, one.channel, one.version) == (2, "canary", 1)
    check(model, one)
    for bad in (
        replace(model, vector=model.vector + 1),
        replace(model, graph=b"another graph"),
        replace(model, task=msgspec.structs.replace(model.task, alarm=Alarm(above=1.0))),
    ):
        with pytest.raises(PeerError, match="not those that were released"):
            check(bad, one)
    check(replace(model, task=msgspec.structs.replace(model.task, round=Round(deadline="9d"))), one)
    told_in_one_line(plant, key, capsys)
    assert run(plant, "release", "--to", "canary") == 0  # the newest
    assert run(plant, "rollback", "--channel", "canary") == 0
    assert "release 4 of wear: version 1 for acme" in capsys.readouterr().out
