"""pyllmc/schedules.py against the formulas, at the points where they are known."""

import math

import pytest

from pyllmc.schedules import SCHEDULES, learning_rate

PEAK = 6e-4


def rate(schedule, step, warmup=10, total=110, final_fraction=0.1):
    return learning_rate(schedule, step, peak=PEAK, warmup=warmup, total=total, final_fraction=final_fraction)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_warmup_is_linear_and_reaches_the_peak(schedule):
    assert [rate(schedule, step) / PEAK for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_cosine():
    assert rate("cosine", 60) == pytest.approx(PEAK * (0.1 + 0.9 / 2))
    assert rate("cosine", 35) == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert rate("cosine", 110) == pytest.approx(0.1 * PEAK)


def test_linear():
    assert rate("linear", 60) == pytest.approx(PEAK * 0.55)
    assert rate("linear", 110) == pytest.approx(0.1 * PEAK)


def test_constant_ignores_warmup():
    assert {rate("constant", step) for step in range(111)} == {PEAK}


def test_wsd_is_stable_for_four_fifths():
    assert {rate("wsd", step) for step in range(10, 88)} == {PEAK}
    assert rate("wsd", 88) == pytest.approx(PEAK)
    assert rate("wsd", 110) == pytest.approx(0.1 * PEAK)
    # A quarter of the decay is done after sqrt(1/4) = half of the way down.
    assert learning_rate("wsd", 85, peak=1.0, warmup=0, total=100, final_fraction=0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 5), (9, 5), (0, 7), (90, 100)])
def test_every_step_has_a_rate(schedule, warmup, total):
    rates = [rate(schedule, step, warmup=warmup, total=total) for step in range(total + 1)]
    assert all(0 < value <= PEAK for value in rates)


def test_never_rises_after_warmup():
    for schedule in SCHEDULES:
        rates = [rate(schedule, step) for step in range(10, 111)]
        assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_wrong_arguments():
    with pytest.raises(
        ValueError, match="unknown learning-rate schedule 'cosinus'; known are cosine, linear, constant, wsd"
    ):
        rate("cosinus", 0)
    for step in (-1, 111):
        with pytest.raises(ValueError, match="step must be from 0 to 110"):
            rate("cosine", step)
