"""`tundish edge status`: what a gateway said of itself last, for people and for scripts."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from broker.topics import GatewayPath, Status
from edge.status import is_alive, read_status, taken_out
from models.commandline import counted
from models.errors import LocalError

# The words of `edge.choose` and `edge.participant` as people read them.
_SCORES = {
    "global": "by the federation's model",
    "tuned": "by the federation's model as tuned here",
    "own": "by this gateway's own model",
    "mix": "by the federation's model and those that learnt here together",
}
_DOES = {
    "idle": "nothing to do",
    "fetching": "waits for its model",
    "waiting": "waits to train",
    "training": "trains",
    "sent": "update sent",
}
_SHOWN = 10
_SKEW_S = 2.0
_STALE_S = 10.0


def main(folder: Path, *, tags: bool, as_json: bool) -> int:
    """Print the status of the gateway with its state in a folder; 1 if it does not run."""
    status = read_status(folder)
    alive = is_alive(folder)
    if status is None and alive:
        raise LocalError(f"the gateway of {folder} is starting; its log says what it waits for")
    if status is None:
        remedy = "start one with tundish edge run, or name the --state that it runs with"
        raise LocalError(f"no gateway has run with its state in {folder}; {remedy}")
    if as_json:
        print(json.dumps(status | {"alive": alive}))
    else:
        _print_status(status, alive=alive, tags=tags)
    return 0 if alive else 1


def _print_status(status: dict[str, Any], *, alive: bool, tags: bool) -> None:
    age = time.time() - status["time_ms"] / 1000
    running = f"running{', BUT SILENT' if age >= _STALE_S else ''}"
    print(f"{status['path']}: {running if alive else 'NOT RUNNING; what it said last:'} ({age:.0f} s ago)")
    mqtt = status["mqtt"]
    print(f"  mqtt     {'connected, MQTT ' + mqtt['version'] if mqtt['connected'] else 'OFFLINE: ' + mqtt['error']}")
    print(f"  memory   {status['resident_mb']} MB resident; outbox {status['outbox']}")
    if status["problem"]:
        print(f"  PROBLEM  {status['problem']}")
    if status.get("restart"):
        print(f"  RESTART  to take up {', '.join(status['restart'])}")
    _print_certificate(status.get("certificate"))
    _print_charter(status.get("charter"))
    if roster := status.get("roster"):
        gateways, enterprises = counted(roster["gateways"], "gateway"), counted(roster["enterprises"], "enterprise")
        print(f"  roster   {gateways} of {enterprises}")
    _print_stranger(status)
    for name, health in status["sources"].items():
        _print_source(name, health)
        if tags:
            _print_tags(name, health)
    for name, task in status["tasks"].items():
        _print_task(name, task, connected=mqtt["connected"])
    for reason, count in status["refused"].items():
        print(f"  refused  {counted(count, 'message')} of others ({reason}): used for nothing; the log says which")
    if status["store_notice"]:
        print(f"  STORE    {status['store_notice']}")
    if status["store_error"]:
        print(f"  STORE    {status['store_error']} ({status['samples_dropped']} samples dropped)")


def _print_task(name: str, task: dict[str, Any], *, connected: bool) -> None:
    print(f"  task     {name}: {task.get('scored', 0)} windows scored, {_model(task)}, {_round(task)}")
    if not task.get("scored") and (task.get("inactive") or task.get("unreliable")):
        why = f"{task['inactive']} while active_when did not hold, {task['unreliable']} with too much that was Bad"
        print(f"           no window could be used: {why}; the gate must hold in all of a window")
    if task.get("alarms"):
        print(f"           alarms: {task['alarm_events']} since the start, {task['alarms']} windows in all")
    _print_release(task)
    if task["problem"]:
        print(f"           PROBLEM {task['problem']}")
    elif task["model"] is None and connected:
        print(f"           no model has come yet: does a federation publish a task named {name}?")
    if task["state"] == "waiting" and task.get("training_waits_for"):
        print(f"           training may start when {task['training_waits_for']}")
    if task["state"] == "waiting" and (windows := task.get("windows")) and windows["trainable"] < windows["wanted"]:
        print(f"           {windows['trainable']} of {windows['wanted']} windows to train on")
    _print_drift(task)


def _model(task: dict[str, Any]) -> str:
    """What scores."""
    if task["model"] is None:
        return "no model yet"
    return f"{_SCORES.get(task['scoring_kind'], 'by nothing yet')}, model version {task['scoring_model']}"


def _round(task: dict[str, Any]) -> str:
    """What this gateway makes of the latest round."""
    if task["round"] is None:
        return "no round yet"
    if task["answer"] == "joined":
        return f"joined round {task['round']}, {_DOES[task['state']]}"
    return f"round {task['round']} {task['answer'] or _DOES[task['state']]}"


def _print_release(task: dict[str, Any]) -> None:
    """Say which release scores here, of a federation that releases, and what is wrong with the metadata."""
    about = task.get("released")
    if about is None:
        return
    of = f" of {about['channel']}" if about["channel"] else ""
    which = f"release {task['release']}{of}, version {about['version']}" if task["release"] else "no release yet"
    print(f"           {which}")
    if about["problem"]:
        print(f"           METADATA {about['problem']}")


def _print_drift(task: dict[str, Any]) -> None:
    """Say which signals are no longer what was trained on, and what a training on such made of an alarm's threshold."""
    drift, chosen = task.get("drift") or {}, task.get("last_model") or {}
    if drift.get("drifted"):
        named = ", ".join(f"{name} {drift['psi'][name]}" for name in drift["drifted"][:_SHOWN])
        more = f" and {len(drift['drifted']) - _SHOWN} more" if len(drift["drifted"]) > _SHOWN else ""
        since = f"the newest {drift['windows']} windows, training had {drift['trained_on']}"
        print(f"           DRIFT {named}{more} (PSI above {drift['above']}; {since})")
    if chosen.get("drifted") and "threshold_before" in chosen:
        moved = f"from {chosen['threshold_before']:.3g} to {chosen['threshold']:.3g}"
        print(f"           THRESHOLD {moved}: trained on what had drifted ({', '.join(chosen['drifted'][:_SHOWN])})")


def _print_certificate(certificate: dict[str, Any] | None) -> None:
    """Say until when this gateway may connect, and who sees to it that it may longer."""
    if certificate is None:
        return
    until, renews = (
        ms and f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d}"
        for ms in (certificate["until_ms"], certificate["renews_ms"])
    )
    how = f"renewed by itself from {renews}" if renews else "renewed by file: tundish edge export, and import"
    print(f"  cert     until {until}, {how}")
    if certificate["problem"]:
        print(f"  RENEWAL  {certificate['problem']}")


def _print_charter(charter: dict[str, Any] | None) -> None:
    """Say what the federation agreed on, and what is to do where this site has not accepted it."""
    if charter is None:
        return
    print(f"  charter  {charter['title']!r} {charter['digest']}")
    if not charter["accepted"]:
        other = f": [policy] names {charter['policy']}, which is another file's" if charter.get("policy") else ""
        how = f'read {charter["file"]}, then [policy] charter = "{charter["digest"]}"'
        print(f"  CHARTER  waits for acceptance{other}: {how}")


def _print_stranger(status: dict[str, Any]) -> None:
    """Say that the broker, or the aggregator (by its roster, or its silence), may not know this gateway.

    The roster has no paths: one who is in it may be known by another.
    """
    if out := taken_out(status):
        print(f"  REVOKED  {out}; scoring goes on; ask the operator, who can enrol it again")
        return
    if not status["mqtt"]["connected"]:
        return
    own = Status(GatewayPath.parse(status["path"])).topic
    if refused := status["mqtt"].get("refused", {}).get(own):
        why = "it was not told of this gateway (tundish broker acl, and a reload), or this gateway was taken out"
        print(f"  REFUSED  the broker lets this gateway say nothing ({refused}): {why}; tried again every minute")
        return
    planned, why = any(task["round"] is not None for task in status["tasks"].values()), ""
    listed = (status.get("roster") or {}).get("has_this")
    if listed and not planned and status["tasks"] and not status["outbox"]:
        print("  waits    for a round: the federation knows this gateway; one opens when due, with enough online")
    elif not status.get("answered", True) and (status["outbox"] or not planned):
        why = f"no {'receipt' if status['outbox'] else 'plan'} for this gateway yet"
    if listed is False:
        why = "the federation does not know this gateway"
    if why:
        enrol = f"tundish broker enrol -c federation.toml --path {status['path']} --key {status['public_key']}"
        print(f"  ENROL    {why}: ask the operator to enrol it: {enrol}")


def _print_source(name: str, health: dict[str, Any]) -> None:
    word = "connected" if health["connected"] else "OFFLINE"
    print(f"  source   {name}: {word}, {health['samples']} samples")
    if health["error"]:
        print(f"           {health['error']}")
    if health["overflows"]:
        print(f"           LOST: the source's queue ran over {health['overflows']} times; raise its queue or queue_s")
    if health["gaps"]:
        print(f"           LOST: {health['gaps']} times the source could not say what came in between")
    skew = health["clock_skew_s"]
    if skew is not None and abs(skew) > _SKEW_S:
        print(
            f"           CLOCK: the source's is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this gateway's"
        )
    for note in health["notes"].values():
        print(f"           note: {note}")
    for ref, why in list(health["quarantined"].items())[:_SHOWN]:
        print(f"           QUARANTINED {ref}: {why}")
    unwell = [(tag, one) for tag, one in health.get("tags", {}).items() if one["word"] or one["out_of_range"]]
    for tag, one in unwell[:_SHOWN]:
        print(f"           {one['word'].upper() or 'OUT OF RANGE'} {name}/{tag}: {_tag_line(one)}")
    if len(unwell) > _SHOWN:
        print(f"           and {len(unwell) - _SHOWN} tags more (--json has all)")
    if len(health["quarantined"]) > _SHOWN:
        print(f"           and {len(health['quarantined']) - _SHOWN} tags more (--json has all)")


def _print_tags(name: str, health: dict[str, Any]) -> None:
    """Every tag's last good value, in its own unit."""
    for tag, one in sorted(health.get("tags", {}).items()):
        value = "no value" if one["value"] is None else f"{one['value']:g}"
        print(f"           {name}/{tag} = {value}, {one['age_s']} s ago {one['word']}".rstrip())


def _tag_line(one: dict[str, Any]) -> str:
    rate = f"{one['rate_hz']:g} values/s" if one["rate_hz"] else "no rate yet"
    return (
        f"{rate}, last {one['age_s']} s ago, unchanged for {one['unchanged_s']} s, {one['bad_ratio']:.0%} bad, "
        f"{one['out_of_range']} out of range, {one['gaps']} gaps"
    )
