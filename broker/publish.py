"""What is said of a task: its newest model, and the plan of its latest round. For the service, and for a file."""

from collections.abc import Set as AbstractSet

from broker.downlink import Downlink, Offer, plan_of
from broker.job import Job
from broker.journal import Journal
from models.errors import LocalError, UserError


def put_model(
    downlink: Downlink,
    journal: Journal,
    job: Job,
    *,
    new: bool = False,
    retained: AbstractSet[tuple[int, str]] = frozenset(),
) -> None:
    """Put the way to the newest model, or (`new`) what leads there from the one before; UserError if it can't be sent.

    What no manifest leads to any more is cleared, but for what is `retained` as (version, name).
    """
    name, version = job.task.name, job.model.version
    now, *before = (Offer.of(journal, name, version - ago) for ago in range(3))
    if now is None:
        raise LocalError(f"{journal.path}: version {version} of {name} is missing; restore a backup")
    try:
        if not new:
            downlink.put_terms(name, job.row)
        # Whoever withholds the metadata of releases must not make gateways score as if there were none.
        downlink.put_model(name, job.row, now, new=new, released="timestamp" in journal.metadata())
    except ValueError as error:
        remedy = "shorten the task, or use a net with fewer arrays"
        raise UserError(name, 0, "", f"its terms do not fit: {error}", remedy) from error
    # Whoever fetches the version before may still end that; what only an older one led to goes.
    last, older = (offer.objects() if offer else {} for offer in before)
    kept = now.objects().keys() | last.keys() | retained
    downlink.clear(name, {key: len(data) for key, data in older.items() if key not in kept})


def put_plan(downlink: Downlink, job: Job, charter: bytes) -> None:
    """Put the plan of the latest round, if there was one, under the charter in force (its SHA-256, or b"")."""
    if not job.federation.number:
        return
    digest, deadline_ms = job.model.digest, job.deadline_ms
    plan = plan_of(
        job.task,
        job.row.text,
        job.federation,
        base_digest=digest,
        deadline_ms=deadline_ms,
        keep=job.keep,
        ring=job.ring,
        charter=charter,
        roster_ms=job.roster_ms,
    )
    downlink.put_plan(job.task.name, plan)
