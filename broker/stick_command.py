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
from broker.publish import put_model, put_plan
from broker.releasing import Releasing
from broker.roster import Rosters
from broker.topics import FL
from models.commandline import counted
from models.errors import LocalError, PeerError, UserError


def import_file(args: argparse.Namespace, config: FederationConfig, state: Path) -> int:
    """Leave a gateway's messages to the aggregator, and say what it will make of each; 1 if none can be used."""
    messages = stick.read(args.file)
    if any(topic.startswith(f"{FL}/") for topic, _ in messages):
        problem = "holds what a federation says to its gateways, which take it by tundish edge import"
        raise UserError(str(args.file), 0, "", problem, "give what tundish edge export --updates wrote")
    with closing(Journal(state)) as journal:
        wanted = {name: job.wanted for name, job in _jobs(journal, config).items()}
        charters = Charters(config.charter, journal, 0)
        reader, used, answered = intake.Intake(config, journal, wanted, charters.covers), 0, False
        for topic, payload in messages:
            try:
                heard = reader.read_filed(Inbound(topic, payload, retain=False, qos=1, mid=0), 0)
            except PeerError as error:
                print(f"refused: {error}")
                continue
            match heard:
                case intake.Refused(path, task, round_, _, reason, detail):
                    answered |= round_ is not None  # by a receipt, on which its gateway forgets the update
                    print(f"refused: {path}, {task}: {reason}: {detail}")
                case intake.HeardUpdate(path, task, update, _):
                    print(f"{path}, {task}: an update of round {update.round}, {len(payload)} bytes")
                case intake.HeardVote(path, task, vote):
                    print(f"{path}, {task}: a vote {vote.verdict} version {vote.version}")
                case intake.HeardAcceptance(path, key, word):
                    what = f"charter {word.digest.hex()}" if word.digest else "no charter"
                    new = charters.hear(path, key, word)  # what comes after it in the file goes by it
                    print(f"{path}: accepts {what}{'' if new else ', which changes nothing'}")
            used += not isinstance(heard, intake.Refused)
    if not used and not answered:
        print(f"nothing of {args.file} can be used, so the aggregator does not get it")
        return 1
    stick.leave(state, args.file)
    takes = "takes it" if used else "counts nothing of it, and answers"
    print(f"the aggregator {takes} within a second, or when it is started; then: tundish broker export")
    return 0 if used else 1


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
        messages = retained + journal.receipts(str(path))
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
