"""`tundish broker import` and `export`: what a gateway without a network sends, and what goes back to it."""

import argparse
import time
from contextlib import closing
from pathlib import Path

from broker import intake, stick
from broker.charters import Charters
from broker.config import FederationConfig
from broker.downlink import Downlink
from broker.identity import gateway_path
from broker.job import Job, load_job
from broker.journal import Journal
from broker.link import Inbound
from broker.messages import Receipt, open_envelope
from broker.publish import put_model, put_plan
from broker.releasing import Releasing
from broker.roster import Rosters
from broker.round import COUNTED, DUPLICATE
from broker.status import is_running
from broker.topics import FL, GatewayPath, ReceiptFor
from models.commandline import counted
from models.errors import LocalError, PeerError, UserError

# The aggregator takes a file within a second, a large one in some more.
_TAKEN_S = 20.0
_LOOK_S = 0.1
_NOTHING = ", which changes nothing"
Update = tuple[str, str, int, bytes]


def import_file(args: argparse.Namespace, config: FederationConfig, state: Path) -> int:
    """Leave a gateway's messages to the aggregator, and say what it makes of each; 1 if it used none."""
    messages = stick.read(args.file)
    if any(topic.startswith(f"{FL}/") for topic, _ in messages):
        problem = "holds what a federation says to its gateways, which take it by tundish edge import"
        raise UserError(str(args.file), 0, "", problem, "give what tundish edge export --updates wrote")
    with closing(Journal(state)) as journal:
        jobs, charters = _jobs(journal, config), Charters(config.charter, journal, 0)
        wanted = {name: job.wanted for name, job in jobs.items()}
        reader, used, answered = intake.Intake(config, journal, wanted, charters.covers), 0, False
        updates = list[Update]()
        for topic, payload in messages:
            try:
                heard = reader.read_filed(Inbound(topic, payload, retain=False, qos=1, mid=0), 0)
            except PeerError as error:
                print(f"refused: {error}")
                continue
            new = not isinstance(heard, intake.Refused)
            match heard:
                case intake.Refused(path, task, round_, _, reason, detail):
                    answered |= round_ is not None  # by a receipt, on which its gateway forgets the update
                    print(f"refused: {path}, {task}: {reason}: {detail}")
                case intake.HeardUpdate(path, task, update, digest):
                    updates.append((path, task, update.round, digest))
                    print(f"{path}, {task}: an update of round {update.round}, {len(payload)} bytes")
                case intake.HeardVote(path, task, vote):
                    ballot = jobs[task].federation.ballot
                    new = ballot is not None and ballot.version == vote.version
                    print(f"{path}, {task}: a vote {vote.verdict} version {vote.version}{'' if new else _NOTHING}")
                case intake.HeardAcceptance(path, key, word):
                    what = f"charter {word.digest.hex()}" if word.digest else "no charter"
                    new = charters.hear(path, key, word) is not None  # what comes after it in the file goes by it
                    print(f"{path}: accepts {what}{'' if new else _NOTHING}")
            used += new
        told = {digest for path, *_ in updates for digest in _receipts(journal, config, path)}
    if not used and not answered:
        print(f"nothing of {args.file} can be used, so the aggregator does not get it")
        return 1
    left = stick.leave(state, args.file)
    if not _is_taken(left, state):
        takes = "takes it" if used else "counts nothing of it, and answers"
        when = "later: it is busy" if is_running(state) else "when it is started"
        print(f"the aggregator {takes} {when}; import the file again then, to see what became of it")
        return 0 if used else 1
    counts = _tell(state, config, list(dict.fromkeys(updates)), told)
    print("the aggregator has taken it; what goes back: tundish broker export")
    return 0 if counts or used > len(updates) else 1


def _is_taken(left: Path, state: Path) -> bool:
    """Wait until the aggregator, if one runs, has heard what was left there."""
    until = time.monotonic() + _TAKEN_S
    while left.exists() and is_running(state) and time.monotonic() < until:
        time.sleep(_LOOK_S)
    return not left.exists()


def _tell(state: Path, config: FederationConfig, updates: list[Update], told: set[bytes]) -> int:
    """Say by its receipt what became of each update; return how many are in a sum. `told` had one before."""
    counts = 0
    with closing(Journal(state)) as journal:
        for path, task, number, digest in updates:
            receipt = _receipts(journal, config, path).get(digest)
            if receipt is None:
                said = "NOT COUNTED: no receipt"
            elif receipt.outcome == DUPLICATE or (receipt.outcome == COUNTED and digest in told):
                said = "counted before"
            elif receipt.outcome == COUNTED:
                said = COUNTED
            else:
                said = f"NOT COUNTED: {receipt.outcome}{receipt.detail and f': {receipt.detail}'}"
            counts += receipt is not None and receipt.outcome in {COUNTED, DUPLICATE}
            print(f"{path}, {task}: the update of round {number}: {said}")
    return counts


def _receipts(journal: Journal, config: FederationConfig, path: str) -> dict[bytes, Receipt]:
    """The receipts that are kept for a gateway, by the digest of the update."""
    key, found = journal.signer().public_key, dict[bytes, Receipt]()
    for task in config.tasks:
        topic = ReceiptFor(config.name, task.task.name, GatewayPath.parse(path)).topic
        sealed = (envelope for where, envelope in journal.receipts(path) if where == topic)
        receipts = (open_envelope(envelope, topic, key, Receipt) for envelope in sealed)
        found |= {receipt.digest: receipt for receipt in receipts}
    return found


def export_file(args: argparse.Namespace, config: FederationConfig, state: Path) -> int:
    """Write what the federation says to a gateway: charter, roster, plans, models, releases, receipts of files."""
    path = gateway_path(args.path, config)
    with closing(Journal(state)) as journal:
        if journal.key_of(str(path)) is None:
            raise UserError("--path", 0, "", f"nobody is enrolled as {path}", "enrol it first: tundish broker enrol")
        signer, jobs = journal.signer(), _jobs(journal, config)
        downlink, now_ms = Downlink(config.name, signer, 0), int(time.time() * 1000)
        charters = Charters(config.charter, journal, now_ms)
        if not charters.in_force:
            raise LocalError("federation.toml has another charter than is in force; restart tundish broker run first")
        if said := charters.message(config.name, signer):
            downlink.put(*said)
        for job in jobs.values():
            put_model(downlink, journal, job)
            put_plan(downlink, job, charters.digest)
        with journal.transaction():
            Rosters(journal, downlink).refresh(now_ms)
        if config.release:
            Releasing(journal, downlink, config.release).put(jobs)
        retained = [(topic, payload) for topic, payload in downlink.waiting if payload]
        # What is for all gateways names none of them: an empty receipt says whose file it is.
        whose = [(ReceiptFor(config.name, name, path).topic, b"") for name in list(jobs)[:1]]
        messages = retained + journal.receipts(str(path)) + whose
    count = stick.write(args.file, messages)
    print(f"{args.file} is for the gateway of {path}: tundish edge import {args.file.name} -c gateway.toml")
    size = sum(len(payload) for _, payload in messages)
    print(f"{counted(count, 'message')}, {size} bytes, {time.strftime('%Y-%m-%d %H:%M')}")
    return 0


def _jobs(journal: Journal, config: FederationConfig) -> dict[str, Job]:
    names = [file.task.name for file in config.tasks]
    if not all(journal.task(name) for name in names):
        raise LocalError(f"{journal.path} has no model yet; run tundish broker run first")
    return {file.task.name: load_job(journal, file) for file in config.tasks}
