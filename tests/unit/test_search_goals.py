"""What a search compares, against plain words and brute force."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan import Look
from orchestrator.search.goals import (
    bounds_of,
    clearly_dominates,
    corrected,
    costs,
    dominates,
    front,
    hopeless,
    nearest,
    saved,
    spread,
    values,
    violations,
)
from orchestrator.spec.search import parse_constraint

POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=12)


@given(points=POINTS)
def test_the_front_is_what_nothing_dominates(points):
    found = {str(i): tuple(map(float, p)) for i, p in enumerate(points)}
    kept = front(found)
    for key, c in found.items():
        beaten = any(
            all(x <= y for x, y in zip(b, c, strict=True)) and b != c for b in found.values()
        )
        first = next(k for k, b in found.items() if b == c)
        assert (key in kept) == (not beaten and key == first)


def test_more_psnr_and_fewer_bytes_are_better():
    assert costs((100.0, 25.0), ("size_bytes", "psnr")) == (100.0, -25.0)
    assert dominates((100.0, -25.0), (100.0, -24.0))
    assert not dominates((100.0, -25.0), (99.0, -24.0))


@pytest.mark.parametrize(
    ("b", "c", "beaten"),
    [
        ((100, -25.0), (100, -24.4), True),  # the same size, 0.6 dB better
        ((100, -25.0), (100, -24.6), False),  # 0.4 dB is within the margin
        ((101, -25.0), (100, -20.0), False),  # it is larger
        ((100, -25.0), (100, -25.0), False),
    ],
)
def test_a_trial_is_clearly_dominated_by_a_margin_in_psnr_alone(b, c, beaten):
    assert clearly_dominates(b, c, ("size_bytes", "psnr"), 0.5) is beaten


@given(
    mse=st.floats(1e-4, 1), other=st.floats(1e-4, 1), margin=st.floats(0.01, 3), size=st.booleans()
)
def test_a_margin_means_the_same_in_mse_and_in_psnr(mse, other, margin, size):
    gap = 10 * math.log10(other / mse)
    if abs(gap - margin) < 1e-9:
        return
    by_mse = clearly_dominates((1, mse), (1, other), ("size_bytes", "mse"), margin)
    b, c = (1, 10 * math.log10(mse)), (1, 10 * math.log10(other))
    assert by_mse == clearly_dominates(b, c, ("size_bytes", "psnr"), margin)


def look(**changes):
    return Look("first", ("size_bytes", "psnr"), **{"first_rays": 10, "margin": 0.5, **changes})


def test_the_first_look_stops_what_is_dominated_or_breaks_a_constraint():
    metrics = {"size_bytes": 500.0, "first_psnr": 24.0}
    assert hopeless(metrics, look()) is None
    assert hopeless(metrics, look(bar=((500.0, -24.3),))) is None
    assert hopeless(metrics, look(bar=((600.0, -30.0), (500.0, -24.6)))) == "dominated"
    assert hopeless(metrics, look(bounds=(("size_bytes", "<=", 499.0),))) == "infeasible"
    assert hopeless(metrics, look(bounds=(("psnr", ">=", 24.4),))) is None  # more rays may say yes
    assert hopeless(metrics, look(bounds=(("psnr", ">=", 24.6),))) == "infeasible"


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("size_bytes <= 500000", 500_000),
        ("size_bytes <= 500kB", 500_000),
        ("size_bytes<=0.5 * dense", 1_000),
        ("psnr >= dense - 0.5", 24.5),
        ("psnr >= dense + 0.5", 25.5),
        ("psnr >= 24", 24),
        ("mse <= 1.5 * dense", 0.0045),
        ("flops <= 1e3", 1000),
        ("render_seconds <= 0.2", 0.2),
    ],
)
def test_constraints_become_bounds(text, bound):
    dense = {"size_bytes": 2_000, "validation_psnr": 25.0, "psnr": 1.0, "validation_mse": 0.003}
    ((_, sense, value),) = bounds_of([parse_constraint(text)], dense)
    assert sense in text
    assert value == pytest.approx(bound)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("psnr > 3", "METRIC <= VALUE"),
        ("size <= 3", "did you mean 'size_bytes'"),
        ("ssim >= dense", "cannot be compared with the dense"),
        ("psnr >= good", "not a number"),
        ("psnr >= inf", "not a finite number"),
        ("size_bytes <= 5apples", "not a number"),
        ("", "METRIC"),
    ],
)
def test_constraints_that_are_none_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_constraint(text)


def test_violations_are_above_zero_where_a_constraint_is_broken():
    bounds = (("size_bytes", "<=", 400.0), ("psnr", ">=", 23.0))
    metrics = {"size_bytes": 500.0, "validation_psnr": 24.0, "first_psnr": 22.0}
    assert violations(metrics, bounds, first=False) == (100.0, -1.0)
    assert violations(metrics, bounds, first=True) == (100.0, 1.0)


def test_a_first_look_is_moved_by_what_other_first_looks_were_wrong_by():
    looked = [((100.0, 25.0), (100.0, 24.0)), ((50.0, 22.5), (50.0, 22.0))]
    assert corrected((70.0, 23.0), looked, ("size_bytes", "psnr")) == (70.0, 22.25)
    assert corrected((70.0, 23.0), [], ("size_bytes", "psnr")) == (70.0, 23.0)
    by_mse = [tuple((s, 10 ** (-p / 10)) for s, p in pair) for pair in looked]
    _, mse = corrected((70.0, 10**-2.3), by_mse, ("size_bytes", "mse"))
    assert -10 * math.log10(mse) == pytest.approx(22.25)


def test_what_a_record_does_not_say_is_nan():
    assert math.isnan(values({"size_bytes": 1.0}, ["psnr"])[0])


@given(count=st.integers(0, 40), most=st.integers(1, 12))
def test_a_thinned_front_keeps_its_ends(count, most):
    found = {f"k{i}": (float(i), float(-i)) for i in range(count)}
    kept = spread(list(found), found, most)
    assert len(kept) == min(count, most)
    assert kept == sorted(kept, key=lambda key: found[key])
    if count > most > 1:
        assert (kept[0], kept[-1]) == ("k0", f"k{count - 1}")
        gaps = [int(b[1:]) - int(a[1:]) for a, b in itertools.pairwise(kept)]
        assert max(gaps) - min(gaps) <= 1


def test_the_nearest_to_a_front_come_first():
    best = [(1.0, -20.0), (2.0, -24.0), (3.0, -26.0)]
    found = {
        "far": (3.0, -14.0),
        "just behind": (2.05, -23.9),
        "smaller and worse": (2.5, -22.0),
        "just behind, too": (1.2, -20.0),
    }
    # By hand: ranges 2 and 12; e.g. "smaller and worse" lies min(0.5/2, 2/12) behind (2, −24).
    assert nearest(found, best) == ["just behind, too", "just behind", "smaller and worse", "far"]
    assert nearest(found, []) == sorted(found)
    assert nearest({}, best) == []


@given(
    cells=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20),
)
def test_what_a_front_does_not_dominate_is_nearer_than_what_it_does(cells):
    found = {f"k{i}": (float(a), float(b)) for i, (a, b) in enumerate(cells)}
    best = [found[key] for key in front(found)]
    order = nearest(found, best)
    assert sorted(order) == sorted(found)
    strictly_behind = [
        any(b[0] < c[0] and b[1] < c[1] for b in best) for c in map(found.get, order)
    ]
    assert strictly_behind == sorted(strictly_behind)


def test_what_a_first_look_saves_is_the_mean_rest_of_the_others():
    full = {"prune": 1.0, "first look": 0.25, "validate": 2.0}
    longer = {"prune": 1.0, "first look": 0.25, "validate": 4.0}
    stopped = {"prune": 1.0, "first look": 0.25}
    assert saved([(full, False), (stopped, True), (longer, False), (stopped, True)]) == {
        "spent": 3.25 + 5.25 + 2 * 1.25,
        "looks": 1.0,
        "saved": 6.0,
    }
    assert saved([]) == {"spent": 0.0, "looks": 0.0, "saved": 0.0}
