"""What is the images driver's alone: pixels, labels, files half written, damaged, or far larger than they look."""

import asyncio
import contextlib
import os
import random
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge.drivers._pictures import grey
from edge.drivers.images import Driver
from edge.tags import Quality, Source, Tag
from models.errors import UserError
from tests.rigs import Collector, running, until

PIXELS = Tag(source="c", name="pixels", address="pixels", type="float32[64]", width=64)
LABEL = Tag(source="c", name="label", address="label")


def save(path: Path, shade: int = 100, at_ns: int = 0, **more: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".part")
    Image.new("L", (32, 16), shade).save(fresh, **({"format": "PNG"} | more))
    if at_ns:
        os.utime(fresh, ns=(at_ns, at_ns))
    fresh.rename(path)
    return path


@contextlib.asynccontextmanager
async def watching(folder: Path, *tags: Tag, **options: object) -> AsyncIterator[tuple[Driver, Collector]]:
    sink = Collector()
    given: dict[str, object] = {"size": 8, "poll_ms": 20}
    source = Source(
        name="c", driver="images", url=folder.name, tags=tags, options=given | options, folder=str(folder.parent)
    )
    driver = Driver(source, sink)
    async with running(driver):
        yield driver, sink


async def test_a_subfolder_is_the_label_and_comes_first_at_the_pictures_time(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    stamp = 1_600_000_000_123_456_789
    save(folder / "scratch" / "1.png", 200, stamp)
    save(folder / "good" / "2.png", 100, stamp + 1)
    save(folder / "other" / "3.png", 50, stamp + 2)
    classes = ["good", "scratch"]
    async with watching(folder, PIXELS, LABEL, classes=classes, backlog=True) as (_, sink):
        await until(lambda: len(sink.batches) == 3)
        assert [[s.tag for s in batch] for batch in sink.batches] == [["c/label", "c/pixels"]] * 3
        assert [{s.time_ns - stamp for s in batch} for batch in sink.batches] == [{0}, {1}, {2}]
        assert [(s.value, s.quality) for s in sink.of("c/label")][:2] == [(1.0, Quality.GOOD), (0.0, Quality.GOOD)]
        assert sink.of("c/label")[2].quality is Quality.BAD  # no class of that name
        for sample, shade in zip(sink.of("c/pixels"), (200, 100, 50), strict=True):
            assert isinstance(sample.value, np.ndarray)
            assert sample.value.dtype == np.float32
            assert sample.value.tolist() == [shade] * 64


async def test_new_pictures_alone_and_each_once(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    save(folder / "old.png", 1, 1_600_000_000_000_000_000)
    async with watching(folder, PIXELS) as (driver, sink):
        await until(lambda: driver.health.connected)
        save(folder / "new.png", 2)
        await until(lambda: len(sink.samples) == 1)
        save(folder / "newer.jpg", 3, format="JPEG")
        await until(lambda: len(sink.samples) == 2)
        await asyncio.sleep(0.2)
        assert [int(s.value[0]) for s in sink.samples] == [2, 3]  # type: ignore[index]


async def test_a_picture_that_arrives_late_is_read_all_the_same(tmp_path: Path) -> None:
    folder, stamp = tmp_path / "p", 1_600_000_000_000_000_000
    save(folder / "old.png", 1, stamp)
    async with watching(folder, PIXELS) as (driver, sink):
        await until(lambda: driver.health.connected)
        for shade, (name, at_ns) in enumerate((("b", stamp + 9), ("a", stamp + 9), ("c", stamp - 9)), 2):
            save(folder / f"{name}.png", shade, at_ns)
            await until(lambda shade=shade: len(sink.samples) == shade - 1)  # type: ignore[misc]
        await asyncio.sleep(0.2)
        assert [int(s.value[0]) for s in sink.samples] == [2, 3, 4]  # type: ignore[index]


async def test_a_picture_older_than_all_that_are_known_is_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.drivers._pictures.MOST_KNOWN", 10)
    folder, stamp = tmp_path / "p", 1_600_000_000_000_000_000
    for number in range(20):
        save(folder / f"{number:02}.png", 1, stamp + number)
    async with watching(folder, PIXELS) as (driver, sink):
        await until(lambda: driver.health.connected)
        save(folder / "within.png", 2, stamp + 15)
        await until(lambda: len(sink.samples) == 1)
        save(folder / "behind.png", 3, stamp + 5)
        await until(lambda: "behind.png is left out" in driver.health.error)
        await asyncio.sleep(0.2)
        assert (driver.health.overflows, len(sink.samples)) == (1, 1)


async def test_half_a_picture_is_waited_for_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    whole = save(tmp_path / "whole.png", 7).read_bytes()
    async with watching(folder, PIXELS, poll_ms=100) as (driver, sink):
        await until(lambda: driver.health.connected)
        with (folder / "slow.png").open("wb", buffering=0) as file:
            for byte in whole:  # a second and more; each look finds it changed
                file.write(bytes([byte]))
                await asyncio.sleep(0.015)
        await until(lambda: len(sink.samples) == 1)
        assert driver.health.overflows == 0
        (folder / "broken.png").write_bytes(whole[:-20])
        await until(lambda: "broken.png is left out" in driver.health.error)
        assert driver.health.overflows == 1
        save(folder / "next.png", 8)
        await until(lambda: len(sink.samples) == 2 and driver.health.error == "")


async def test_labels_of_a_csv_as_they_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    labels = tmp_path / "labels.csv"
    labels.write_text("file,class,depth\n1.png,scratch,0.5\n")
    tags = (LABEL, *(Tag(source="c", name=name, address=name) for name in ("class", "depth")))
    async with watching(folder, PIXELS, *tags, labels="labels.csv", classes=["good", "scratch"]) as (driver, sink):
        await until(lambda: driver.health.connected)
        save(folder / "1.png")
        await until(lambda: len(sink.of("c/pixels")) == 1)
        assert {s.tag: s.value for s in sink.samples if s.quality is Quality.GOOD and s.tag != "c/pixels"} == {
            "c/class": 1.0,
            "c/depth": 0.5,
        }
        assert list(driver.health.quarantined) == ["c/label"]
        save(folder / "2.png")
        await until(lambda: len(sink.of("c/pixels")) == 2)
        assert sink.of("c/class")[-1].quality is Quality.BAD
        labels.write_text("file;class;depth\n3.png;good;1\n")
        save(folder / "3.png")
        await until(lambda: len(sink.of("c/pixels")) == 3)
        assert sink.of("c/class")[-1].value == 0.0


def png(width: int, height: int) -> bytes:
    """Build a PNG whose header promises a size, and whose pixels are few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (5001, 5000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    with pytest.raises((ValueError, Image.DecompressionBombError)):
        grey(path, 8)


def test_a_file_too_large_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ValueError, match="64 MiB"):
        grey(path, 8)


def test_every_depth_is_grey_of_the_same_range(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    eight = grey(path, 8)
    assert eight.shape == (64,)
    assert eight[0] < 20
    assert eight[-1] > 235
    Image.fromarray((ramp * 257).astype(np.uint16)).save(path)
    np.testing.assert_allclose(grey(path, 8), eight, atol=1.5)
    for mode in ("RGB", "RGBA", "P"):
        Image.fromarray(ramp.astype(np.uint8)).convert(mode).save(path)
        np.testing.assert_allclose(grey(path, 8), eight, atol=3)


async def test_any_damage_is_a_picture_left_out(tmp_path: Path) -> None:
    rng = random.Random(2)  # noqa: S311 - a fuzzer's
    folder = tmp_path / "p"
    folder.mkdir()
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg")):
        whole = save(tmp_path / f"whole.{suffix}", 90, format=kind).read_bytes()
        for n in range(40):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (folder / f"{n}.{suffix}").write_bytes(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
    async with watching(folder, PIXELS, backlog=True) as (driver, sink):
        await until(lambda: len(sink.samples) + driver.health.overflows == 80)
        assert driver.health.overflows > 10
        assert driver.health.connects == 1


@pytest.mark.parametrize(
    ("tag", "options", "key"),
    [
        (Tag(source="c", name="p", address="pixels", type="float32[63]", width=63), {"size": 8}, "type"),
        (Tag(source="c", name="p", address="depth"), {}, "address"),
        (LABEL, {"classes": ["a", "a"]}, "classes"),
        (LABEL, {"classes": [1]}, "classes"),
        (LABEL, {"size": 4}, "size"),
    ],
)
def test_settings_that_are_none(tag: Tag, options: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: "):
        Driver(Source(name="c", driver="images", url="p", tags=(tag,), options=options), Collector())
