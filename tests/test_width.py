"""A part of a net: found from shapes, nested, exact in the whole net, and averaged where it is had."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from broker.aggregate import next_model, strategy_names
from broker.intake import Wanted, check_update
from broker.messages import Update
from models import codec, fit
from models.delta import Layout, Vector
from models.errors import PeerError
from models.export import export
from models.graph import make_session
from models.spec import Task, net_names, parse_task
from models.width import NETS, WIDTHS, narrow, slices, unfit, widen

RANDOM = np.random.default_rng(5)
NETWORKS = [("autoencoder", 8), ("cnn2d", 256), ("mlp", 3), ("tcn", 30), ("tcn", 512)]


def task(net: str = "mlp", length: int = 3, more: str = "") -> Task:
    kind, target = ("anomaly", "") if net == "autoencoder" else ("regression", '[target]\nname = "y"\n')
    signals = '[[signal]]\nname = "a"\n[[signal]]\nname = "b"\n'
    return parse_task(
        f'name = "t"\nkind = "{kind}"\nnet = "{net}"\n{more}[window]\nlength = {length}\n{target}{signals}'
    )


def layout_of(one: Task, width: float = 1) -> Layout:
    return Layout.of(fit.arrays_of(fit.build_net(one, width)))


def numbers(count: int) -> Vector:
    return RANDOM.normal(0, 0.3, count).astype(np.float32)


def test_every_net_here_has_a_narrow_form() -> None:
    assert sorted(NETS) == net_names() == sorted({net for net, _ in NETWORKS})


def test_a_net_without_a_narrow_form_is_whole_at_width_one() -> None:
    shapes = (12, 3), (12, 4), (12,), (4, 1, 3), (2, 9)
    odd = Layout(tuple(f"p{i}" for i in range(5)), shapes, ())
    layout, places = narrow(odd, 1)
    assert layout == odd
    np.testing.assert_array_equal(places, np.arange(odd.size))


@pytest.mark.parametrize(("net", "length"), NETWORKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_narrow_net_is_the_whole_one_of_zeros_elsewhere(net: str, length: int, width: float) -> None:
    one = task(net, length)
    whole = layout_of(one)
    inner, places = narrow(whole, width)
    assert inner == layout_of(one, width)
    assert places.size == inner.size == len(np.unique(places))
    module, vector = fit.build_net(one, width).eval(), numbers(inner.size)
    fit.load_vector(module, inner, vector)
    graph, exported, _ = export(one, 0)
    assert exported == whole
    x = 3 + RANDOM.normal(size=(7, *one.input_shape)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    got = make_session(graph, whole, widen(whole, width, vector), threads=1).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(("net", "length"), NETWORKS)
def test_parts_lie_within_one_another(net: str, length: int) -> None:
    whole = layout_of(task(net, length))
    kept = [set(narrow(whole, width)[1].tolist()) for width in WIDTHS]
    assert all(less < more for less, more in pairwise(kept))
    assert kept[-1] == set(range(whole.size))
    # Weights of a hidden layer fall with the square of the width.
    assert len(kept[1]) < 0.45 * whole.size


def test_a_width_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0.25, 0.5, 0.75, 1"):
        narrow(layout_of(task()), 0.6)


def test_a_part_trains_as_a_net_of_its_own_and_gives_whole_weights() -> None:
    one = task()
    layout = layout_of(one)
    base, x = numbers(layout.size), RANDOM.normal(size=(64, 2, 3)).astype(np.float32)
    y = x[:, 0, 0] - x[:, 1, 2]
    inner, places = narrow(layout, 0.5)
    found = fit.fit(one, layout, base, x, y, seed=1, epochs=30, width=0.5)
    elsewhere = np.ones(layout.size, np.bool_)
    elsewhere[places] = False
    assert not found.vector[elsewhere].any()
    assert found.vector[places].all()
    assert not np.array_equal(found.vector[places], base[places])
    first = fit.fit(one, layout, base, x, y, seed=1, epochs=1, width=0.5)
    assert found.loss < first.loss / 2
    assert inner.size == places.size


@pytest.mark.parametrize("personal", [(), ("head",), ("body", "head.weight")])
def test_slices_count_among_what_is_shared(personal: tuple[str, ...]) -> None:
    one = task(more=f"personal = {list(personal)}\n".replace("'", '"'))
    layout = layout_of(one)
    shared, vector = layout.mask(one.personal), np.arange(layout.size)
    for width, places in slices(one, layout).items():
        inside = narrow(layout, width)[1]
        assert vector[shared][places].tolist() == [p for p in inside.tolist() if shared[p]]


# -- at the aggregator ----------------------------------------------------------------------------------------------

SLICES = {0.25: np.array([0]), 0.5: np.array([0, 2])}


def closed(
    name: str, *updates: tuple[list[float], int], state: bytes = b"", momentum: float = 0.0
) -> tuple[bytes, Vector]:
    rows = ((codec.encode(np.array(row, np.float32), codec.EXACT).data, n, 0) for row, n in updates)
    every = np.ones(4, np.bool_)
    return next_model(name, state, np.ones(4, np.float32), every, rows, momentum=momentum, slices=SLICES)


def test_each_value_is_the_mean_of_those_who_have_it() -> None:
    _, vector = closed("fedavg", ([4, 4, 4, 4], 1), ([8], 1), ([1, 2], 2))
    assert (vector - 1).tolist() == [3.5, 4, pytest.approx(8 / 3), 4]


@pytest.mark.parametrize("name", strategy_names())
def test_what_nobody_has_stays_whatever_the_momentum(name: str) -> None:
    state, first = closed(name, ([4, 4, 4, 4], 1), momentum=0.5)
    assert (first != 1).all()
    _, vector = closed(name, ([1, 2], 3), ([1], 1), state=state, momentum=0.5)
    assert (vector[[0, 2]] != 1).all()
    assert vector[[1, 3]].tolist() == [1, 1]


@pytest.mark.parametrize("name", strategy_names())
def test_a_sparse_part_counts_as_the_dense_one(name: str) -> None:
    places, values = np.arange(0, 600, 2), np.where(np.arange(300) % 40 == 7, 0.5, 0).astype(np.float32)
    base, every = np.zeros(600, np.float32), np.ones(600, np.bool_)
    sparse = codec.encode(values, codec.SPARSE, 0.1)
    payloads = sparse.data, codec.encode(sparse.decoded, codec.EXACT).data
    found = [
        next_model(name, b"", base, every, iter([(data, 3, 2)]), momentum=0.0, slices={0.5: places})[1]
        for data in payloads
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.flatnonzero(found[0]).tolist() == (2 * np.flatnonzero(values)).tolist()


@pytest.mark.parametrize(
    ("quarters", "count", "reason"),
    [(2, 4, "layout"), (4, 2, "layout"), (1, 2, "layout"), (3, 4, "width"), (2, 2, ""), (1, 1, ""), (4, 4, "")],
)
def test_a_payload_is_of_the_width_that_is_claimed(quarters: int, count: int, reason: str) -> None:
    update = Update(1, 1, 0, 9, None, codec.encode(np.ones(count, np.float32), 8).data, None, quarters)
    wanted = Wanted(task(), 4, slices=SLICES)
    if reason:
        with pytest.raises(PeerError) as refused:
            check_update(update, wanted)
        assert refused.value.reason == reason
    else:
        check_update(update, wanted)


def test_a_part_that_is_cut_or_changed_is_refused() -> None:
    whole = codec.encode(numbers(300), 8).data
    wanted = Wanted(task(), 600, slices={0.5: np.arange(300)})
    for end in range(len(whole)):
        with pytest.raises(PeerError):
            check_update(Update(1, 1, 0, 9, None, whole[:end], None, 2), wanted)
    with pytest.raises(PeerError):
        check_update(Update(1, 1, 0, 9, None, whole + b"\0", None, 2), wanted)


def test_a_ring_adds_whole_nets_alone() -> None:
    ring = task(more='[round]\ncodec = "ring"\n')
    assert "ring" in unfit(ring, 0.5)
    assert not unfit(ring, 1)
    assert not unfit(task(), 0.5)
    update = Update(1, 1, 0, 9, None, b"", None, 2)
    with pytest.raises(PeerError) as refused:
        check_update(update, Wanted(ring, 600, slices={0.5: np.arange(300)}))
    assert refused.value.reason == "width"
