"""OPC UA in depth, against two servers: asyncua's, and node-opcua, which nobody of this project wrote."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from asyncua import ua
from asyncua.common.connection import SecureConnection
from asyncua.common.utils import ServiceError
from asyncua.server.internal_session import InternalSession
from asyncua.ua.status_codes import StatusCodes

from edge.drivers._opcua_pki import make_identity, own_identity
from edge.tags import Quality, Source
from tests.opcua_rigs import (
    PASSWORD,
    USER,
    AsyncuaPlant,
    NodePlant,
    Plant,
    install_node,
    line_to,
    source,
    tag,
    with_url,
    write_identity,
)
from tests.rigs import until
from tests.test_drivers import last, make, running

SECURE = [
    f"{policy}:{mode}"
    for policy in ("Basic256Sha256", "Aes128_Sha256_RsaOaep", "Aes256_Sha256_RsaPss")
    for mode in ("Sign", "SignAndEncrypt")
]

shared = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(params=["asyncua", "node-opcua"], scope="module", loop_scope="module")
async def plant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    folder = tmp_path_factory.mktemp("server")
    made: Plant
    if request.param == "asyncua":
        made = AsyncuaPlant(folder)
    else:
        cache = request.config.cache
        assert cache is not None
        made = NodePlant(folder, install_node(cache.mkdir("node_opcua")))
    await made.start()
    try:
        await made.add("A", 1.5)
        await made.add("Flag", value=True)
        await made.add("Count", 0.0)
        yield made
    finally:
        await made.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pki(plant: Plant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The PKI folder of a gateway that the server knows and that knows the server."""
    folder = tmp_path_factory.mktemp("gateway") / "pki"
    await plant.trust(own_identity(folder).certificate)
    (folder / "trusted").mkdir()
    (folder / "trusted" / "rig.pem").write_bytes(plant.certificate.read_bytes())
    return folder


async def reads(made: Source) -> tuple[bool, str]:
    """Say whether a source's first tag comes Good, or what is said instead."""
    driver, sink = make(made)
    async with running(driver):
        await until(lambda: last(sink, made.tags[0].ref)[1] is Quality.GOOD or bool(driver.health.error))
        return last(sink, made.tags[0].ref)[1] is Quality.GOOD, driver.health.error


# -- security --------------------------------------------------------------------------------------------------------


@shared
@pytest.mark.parametrize("security", ["None", *SECURE])
async def test_every_policy_and_mode_reads(plant: Plant, pki: Path, security: str) -> None:
    assert await reads(source(plant, tag("A"), pki=pki, security=security)) == (True, "")


@shared
@pytest.mark.parametrize("security", ["None", SECURE[1], SECURE[5]])
async def test_a_user_comes_in_with_the_right_password_alone(
    plant: Plant, pki: Path, tmp_path: Path, security: str
) -> None:
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    made = source(plant, tag("A"), pki=pki, security=security, user=USER, password_file=str(file))
    assert await reads(made) == (True, "")
    file.write_text("wrong")
    good, error = await reads(made)
    assert not good
    assert "refuses the user; check user and password_file" in error


@shared
async def test_a_password_that_is_mended_is_taken_at_the_next_try(plant: Plant, pki: Path, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("wrong")
    made = source(plant, tag("A"), pki=pki, security=SECURE[1], user=USER, password_file=str(file))
    driver, sink = make(made)
    async with running(driver):
        await until(lambda: "refuses the user" in driver.health.error)
        file.unlink()
        await until(lambda: "can't be read; check its path and permissions" in driver.health.error)
        file.write_text(PASSWORD)
        await until(lambda: last(sink, "plc/A")[1] is Quality.GOOD)
        assert driver.health.error == ""


@shared
@pytest.mark.parametrize("security", [SECURE[0], SECURE[3], SECURE[5]])
async def test_a_user_comes_in_with_a_certificate(plant: Plant, pki: Path, tmp_path: Path, security: str) -> None:
    known, stranger = (make_identity(f"urn:user:{name}", name, []) for name in ("ot", "stranger"))
    await plant.trust(known.certificate, user=True)
    for identity, comes_in in ((known, True), (stranger, False)):
        certificate, key = write_identity(identity, tmp_path, "user")
        made = source(plant, tag("A"), pki=pki, security=security, user_certificate=str(certificate), user_key=str(key))
        good, error = await reads(made)
        assert good is comes_in
        assert comes_in or "refuses the user" in error


@shared
async def test_an_untrusted_server_is_refused_until_its_certificate_is_moved(plant: Plant, tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    await plant.trust(own_identity(pki).certificate)
    driver, sink = make(source(plant, tag("A"), pki=pki, security=SECURE[1]))
    async with running(driver):
        await until(lambda: bool(driver.health.error))
        (rejected,) = (pki / "rejected").iterdir()
        said = driver.health.error
        assert "the server's certificate is not trusted: Rig, SHA-256 " in said
        assert f"then move {rejected} to {pki / 'trusted'}" in said
        assert "\n" not in said
        assert sink.samples == []
        rejected.rename(pki / "trusted" / rejected.name)
        await until(lambda: last(sink, "plc/A")[1] is Quality.GOOD)
        assert driver.health.error == ""


@shared
async def test_a_server_that_does_not_know_the_gateway_is_named(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "trusted").mkdir()
    (tmp_path / "trusted" / "rig.pem").write_bytes(plant.certificate.read_bytes())
    good, error = await reads(source(plant, tag("A"), pki=tmp_path, security=SECURE[1]))
    assert not good
    assert "refuses this gateway's certificate; trust it at the server" in error


@shared
async def test_a_certificate_for_another_host_is_refused(plant: Plant, pki: Path) -> None:
    made = source(plant, tag("A"), pki=pki, security=SECURE[1])
    good, error = await reads(with_url(made, made.url.replace("127.0.0.1", "localhost")))
    assert not good
    assert "is for 127.0.0.1, not for localhost; write one of these in url" in error


@pytest.mark.asyncio
async def test_a_server_with_another_certificate_is_not_the_one_that_was_trusted(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    first = AsyncuaPlant(tmp_path)
    await first.trust(own_identity(pki).certificate)
    (pki / "trusted").mkdir()
    (pki / "trusted" / "rig.pem").write_bytes(first.certificate.read_bytes())
    await first.start()
    await first.add("A", 1.0)
    driver, sink = make(source(first, tag("A"), pki=pki, security=SECURE[1]))
    async with running(driver):
        await until(lambda: last(sink, "plc/A")[1] is Quality.GOOD)
        await first.stop()
        second = AsyncuaPlant(tmp_path)
        second.port = first.port
        await second.start()
        try:
            await until(lambda: "the server's certificate is not trusted" in driver.health.error)
            assert last(sink, "plc/A")[1] is Quality.BAD
            assert driver.health.gaps == 0  # nobody has answered yet
        finally:
            await second.stop()


# -- cuts ------------------------------------------------------------------------------------------------------------


async def count_up(plant: Plant, done: asyncio.Event) -> int:
    """Write 1, 2, 3 … every 50 ms until told to stop; return the last number."""
    number = 0
    while not done.is_set():
        number += 1
        await plant.put("Count", float(number))
        await asyncio.sleep(0.05)
    return number


@shared
@pytest.mark.parametrize("security", ["None", SECURE[1]])
async def test_no_value_is_lost_or_doubled_by_a_cut(plant: Plant, pki: Path, security: str) -> None:
    await plant.put("Count", 0.0)
    async with line_to(plant) as line:
        count = tag("Count", sampling_ms=10)
        made = source(plant, count, tag("Flag"), pki=pki, port=line.port, security=security)
        driver, sink = make(made)
        done = asyncio.Event()
        async with running(driver):
            await until(lambda: len({s.tag for s in sink.samples}) == 2)
            counting = asyncio.create_task(count_up(plant, done))
            await until(lambda: len(sink.samples) > 10)
            for _ in range(2 if security == "None" else 1):
                await line.cut()
                await until(lambda: not driver.health.connected)
                assert last(sink, "plc/Flag")[1] is Quality.BAD
                await asyncio.sleep(2.0)
                await line.mend()
                await until(lambda: driver.health.connected and last(sink, "plc/Flag")[1] is Quality.GOOD)
            await asyncio.sleep(0.3)
            done.set()
            final = await counting
            await until(lambda: last(sink, "plc/Count")[0] == final)
        good = [s for s in sink.of("plc/Count") if s.quality is Quality.GOOD]
        assert [s.value for s in good] == [float(number) for number in range(final + 1)]
        assert [s.time_ns for s in good] == sorted({s.time_ns for s in good})
        assert (driver.health.gaps, driver.health.overflows, driver.health.connects) == (
            0,
            0,
            3 if security == "None" else 2,
        )
        assert [s.value for s in sink.of("plc/Flag") if s.quality is Quality.GOOD] == [1.0] * driver.health.connects


@shared
async def test_a_server_that_forgot_the_session_gives_the_subscription_or_a_gap(plant: Plant) -> None:
    """A server may drop a session before its subscriptions: node-opcua hands them over, asyncua ends them too."""
    await plant.put("Count", 0.0)
    async with line_to(plant) as line:
        driver, sink = make(source(plant, tag("Count", sampling_ms=10), port=line.port))
        async with running(driver):
            await until(lambda: bool(sink.samples))
            await line.cut()
            await until(lambda: not driver.health.connected)
            await plant.forget_sessions()
            for number in (1.0, 2.0, 3.0):
                await plant.put("Count", number)
                await asyncio.sleep(0.1)
            await line.mend()
            await until(lambda: last(sink, "plc/Count") == (3.0, Quality.GOOD))
            good = [s.value for s in sink.of("plc/Count") if s.quality is Quality.GOOD]
            assert (driver.health.gaps, good) == ((0, [0.0, 1.0, 2.0, 3.0]) if plant.transfers else (1, [0.0, 3.0]))


@pytest.mark.asyncio
async def test_a_channel_of_three_seconds_is_renewed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server revises what was asked for, and knows a key no longer than that."""
    opened: list[ua.SecurityTokenRequestType] = []
    real = SecureConnection.open

    def brief(self: SecureConnection, params: Any, server: Any) -> Any:
        opened.append(params.RequestType)
        params.RequestedLifetime = 3000
        return real(self, params, server)

    monkeypatch.setattr(SecureConnection, "open", brief)
    pki, rig = tmp_path / "pki", AsyncuaPlant(tmp_path)
    await rig.trust(own_identity(pki).certificate)
    (pki / "trusted").mkdir()
    (pki / "trusted" / "rig.pem").write_bytes(rig.certificate.read_bytes())
    await rig.start()
    await rig.add("Count", 0.0)
    driver, sink = make(source(rig, tag("Count", sampling_ms=10), pki=pki, security=SECURE[1]))
    done = asyncio.Event()
    async with running(driver):
        await until(lambda: bool(sink.samples))
        counting = asyncio.create_task(count_up(rig, done))
        await until(lambda: opened.count(ua.SecurityTokenRequestType.Renew) >= 3)
        await asyncio.sleep(0.3)
        done.set()
        final = await counting
        await until(lambda: last(sink, "plc/Count")[0] == final)
        good = [s.value for s in sink.samples if s.quality is Quality.GOOD]
        assert good == [float(number) for number in range(final + 1)]
    await rig.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [StatusCodes.BadServiceUnsupported, StatusCodes.BadTooManySubscriptions])
async def test_a_server_that_gives_no_subscription_is_polled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise ServiceError(code)

    monkeypatch.setattr(InternalSession, "create_subscription", refuse)
    rig = AsyncuaPlant(tmp_path)
    await rig.start()
    await rig.add("A", 1.0)
    driver, sink = make(source(rig, tag("A", sampling_ms=20), tag("Later")))
    async with running(driver):
        await until(lambda: last(sink, "plc/A") == (1.0, Quality.GOOD))
        assert driver.health.notes["mode"].startswith("the server gives no subscription (Bad")
        assert driver.health.notes["mode"].endswith("): values are polled")
        await rig.put("A", 2.0)
        await until(lambda: last(sink, "plc/A") == (2.0, Quality.GOOD))
        await rig.add("Later", 5.0)
        await until(lambda: last(sink, "plc/Later") == (5.0, Quality.GOOD))
        assert (driver.health.connects, driver.health.error) == (1, "")
    await rig.stop()


# -- items -----------------------------------------------------------------------------------------------------------


@shared
async def test_what_runs_over_the_servers_queue_in_a_cut_is_counted(plant: Plant) -> None:
    """asyncua's server drops values without the overflow bit: a queue that comes back full is a gap."""
    await plant.put("Count", 0.0)
    async with line_to(plant) as line:
        driver, sink = make(source(plant, tag("Count", sampling_ms=10), port=line.port, queue_s=0.0))
        async with running(driver):
            await until(lambda: bool(sink.samples))
            await line.cut()
            await until(lambda: not driver.health.connected)
            for number in range(1, 31):
                await plant.put("Count", float(number))
                await asyncio.sleep(0.03)
            await line.mend()
            await until(lambda: last(sink, "plc/Count") == (30.0, Quality.GOOD))
            await until(lambda: driver.health.overflows + driver.health.gaps > 0)
            assert (driver.health.overflows > 0, driver.health.gaps) == (
                (True, 0) if plant.flags_overflow else (False, 1)
            )


async def test_a_restarted_servers_subscriptions_are_not_taken_from_others(tmp_path: Path) -> None:
    """asyncua numbers sessions and subscriptions alike in every life: the number of before is somebody else's now."""
    rig = AsyncuaPlant(tmp_path)
    await rig.start()
    await rig.add("A", 1.0)
    made = source(rig, tag("A"))
    (driver, sink), (other, others) = make(made), make(made)
    async with running(driver):
        await until(lambda: last(sink, "plc/A")[1] is Quality.GOOD)
        await rig.stop()
        await until(lambda: last(sink, "plc/A")[1] is Quality.BAD)
        async with running(other):
            await rig.start()
            await rig.add("A", 1.0)
            await until(lambda: last(sink, "plc/A")[1] is last(others, "plc/A")[1] is Quality.GOOD, 60.0)
            await rig.put("A", 2.0)
            await until(lambda: last(sink, "plc/A")[0] == last(others, "plc/A")[0] == 2.0)
            assert (driver.health.gaps, other.health.gaps) == (1, 0)
    await rig.stop()


@shared
async def test_a_silent_subscription_is_given_up_and_made_again(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    await plant.put("A", 1.0)
    driver, sink = make(source(plant, tag("A")))
    async with running(driver):
        await until(lambda: last(sink, "plc/A")[0] == 1.0)
        monkeypatch.setattr(driver, "_silent_s", 0.0)
        await until(lambda: driver.health.connects == 2 and last(sink, "plc/A") == (1.0, Quality.GOOD))
        assert driver.health.gaps == 1
        assert [s.quality for s in sink.of("plc/A")] == [Quality.GOOD, Quality.BAD, Quality.GOOD]


@shared
async def test_polling_goes_on_after_a_cut(plant: Plant) -> None:
    await plant.put("A", 1.0)
    async with line_to(plant) as line:
        driver, sink = make(source(plant, tag("A", sampling_ms=20), mode="poll", port=line.port))
        async with running(driver):
            await until(lambda: last(sink, "plc/A")[0] == 1.0)
            await line.cut()
            await until(lambda: last(sink, "plc/A")[1] is Quality.BAD)
            await line.mend()
            await until(lambda: last(sink, "plc/A") == (1.0, Quality.GOOD))


@shared
async def test_polling_delivers_changes_and_quarantines_what_is_missing(plant: Plant) -> None:
    driver, sink = make(source(plant, tag("A", sampling_ms=20), tag("Later"), mode="poll"))
    await plant.put("A", 1.0)
    async with running(driver):
        await until(lambda: last(sink, "plc/A")[0] == 1.0 and "plc/Later" in driver.health.quarantined)
        await plant.put("A", 2.0)
        await until(lambda: last(sink, "plc/A")[0] == 2.0)
        assert [s.value for s in sink.of("plc/A")] == [1.0, 2.0]
        await plant.add("Later", 5.0)
        await until(lambda: last(sink, "plc/Later")[0] == 5.0)
        assert driver.health.quarantined == {}
        await plant.remove("Later")
        await until(lambda: "plc/Later" in driver.health.quarantined)
        assert last(sink, "plc/Later")[1] is Quality.BAD


@shared
async def test_a_tag_that_vanishes_is_quarantined_and_comes_back(plant: Plant) -> None:
    if not plant.tells_removal:
        pytest.skip("asyncua's server says nothing when a monitored node is removed")
    await plant.add("Gone", 1.0)
    driver, sink = make(source(plant, tag("Gone"), tag("A")))
    async with running(driver):
        await until(lambda: last(sink, "plc/Gone")[0] == 1.0)
        await plant.remove("Gone")
        await until(lambda: "plc/Gone" in driver.health.quarantined)
        assert "any more" in driver.health.quarantined["plc/Gone"]
        assert [s.quality for s in sink.of("plc/Gone")] == [Quality.GOOD, Quality.BAD]
        await plant.put("A", 7.5)
        await until(lambda: last(sink, "plc/A")[0] == 7.5)
        await plant.add("Gone", 2.0)
        await until(lambda: last(sink, "plc/Gone") == (2.0, Quality.GOOD))
        assert driver.health.quarantined == {}
    await plant.remove("Gone")


@shared
async def test_a_deadband_of_percent_is_the_servers_work_or_said_to_be_missing(plant: Plant) -> None:
    await plant.add("Ranged", 0.0, range=[0, 200], unit="degree_celsius")
    await plant.add("Plain", 0.0)
    tags = [tag(name, deadband_percent=5.0, sampling_ms=10) for name in ("Ranged", "Plain")]
    driver, sink = make(source(plant, *tags))
    async with running(driver):
        await until(lambda: len({s.tag for s in sink.samples}) == len(tags))
        for value in (4.0, 9.0, 15.0):
            for name in ("Ranged", "Plain"):
                await plant.put(name, value)
            await until(lambda value=value: last(sink, "plc/Plain")[0] == value)  # type: ignore[misc]
        await until(lambda: last(sink, "plc/Ranged")[0] == 15.0)
        if plant.knows_percent:
            assert [s.value for s in sink.of("plc/Ranged")] == [0.0, 15.0]
            assert driver.health.notes["deadband"].startswith("plc/Plain: the server knows no percent deadband for it")


@shared
async def test_what_a_server_gives_less_than_asked_is_noted(plant: Plant) -> None:
    fast = source(plant, tag("A", sampling_ms=1), tag("Flag", sampling_ms=1), queue_s=3600)
    driver, sink = make(fast)
    async with running(driver):
        await until(lambda: len({s.tag for s in sink.samples}) == 2)
        notes = driver.health.notes
        assert notes["sampling"].startswith("plc/A: the server samples every ")
        assert notes["sampling"].endswith("(and 1 tags more)")
        assert notes["lifetime"] == "the server keeps the subscription for 120 s of a cut only"
