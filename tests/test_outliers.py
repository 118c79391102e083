"""pyllmc/outliers.py: z-scores beside NumPy's, what the window takes in, what a guard lets through, and the state."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllmc.outliers import LARGEST, WINDOW, Detector, Guard

RANDOM = np.random.default_rng(0)
# Losses as a run has them: float32, falling, with noise.
LOSSES = (3 + np.exp(-np.arange(400) / 100) + RANDOM.normal(0, 0.1, 400)).astype(np.float32).astype(float).tolist()


def by_numpy(values):
    """The z-score of the last of WINDOW values."""
    window = np.array(values[-WINDOW:])
    return (window[-1] - window.mean()) / window.std()


def fed(values) -> Detector:
    detector = Detector()
    for value in values:
        detector.update(value)
    return detector


def bits(numbers) -> bytes:
    return np.array(numbers, np.float64).tobytes()


# ---- z-scores --------------------------------------------------------------------------------------------------------


def test_z_scores_are_those_of_the_last_128_numbers():
    detector = Detector()
    for i, loss in enumerate(LOSSES):
        z = detector.update(loss)
        if i < WINDOW:
            assert math.isnan(z)
        else:
            assert z == pytest.approx(by_numpy(LOSSES[: i + 1]), rel=1e-12, abs=1e-12)


def test_a_number_that_stands_out_is_seen_and_then_is_one_of_the_window():
    noise = RANDOM.uniform(-1, 1, 2 * WINDOW).tolist()
    detector = fed(noise)
    assert detector.update(10.0) > 5
    assert detector.update(10.0) == pytest.approx(by_numpy([*noise, 10.0, 10.0]))
    # What stays where it jumped to counts as usual.
    for _ in range(WINDOW - 2):
        z = detector.update(10.0)
    assert z == 0


def test_equal_numbers_have_z_0():
    for value in (0.0, 0.1, -1e100, LARGEST):
        assert fed([value] * WINDOW).update(value) == 0


def test_no_z_is_above_11_27():
    for usual, other in ((0.0, 1.0), (5.0, 5.5), (3e38, -3e38), (0.0, LARGEST)):
        z = fed([usual] * WINDOW).update(other)
        assert abs(z) == pytest.approx(math.sqrt(WINDOW - 1)) and (z > 0) == (other > usual)


def test_a_huge_number_leaves_no_trace_once_it_has_left_the_window():
    """Running sums would have lost every digit."""
    detector, usual = fed([*LOSSES[:130], 1e30, *LOSSES[130:257]]), fed(LOSSES[129:257])
    for loss in LOSSES[257:]:
        assert detector.update(loss) == usual.update(loss)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=WINDOW, max_size=WINDOW), st.floats(-1e4, 1e4, width=32))
def test_the_order_of_the_window_changes_no_bit(window, x):
    assert fed(window).update(x) == fed([window[0], *sorted(window[1:])]).update(x)


@given(st.lists(st.floats(-LARGEST, LARGEST), min_size=WINDOW, max_size=WINDOW), st.floats(-LARGEST, LARGEST))
def test_a_full_window_always_has_a_z(window, x):
    assert abs(fed(window).update(x)) <= math.sqrt(WINDOW)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2 * LARGEST])
@pytest.mark.parametrize("before", [0, WINDOW - 1, WINDOW, 200])
def test_what_is_not_finite_never_enters_the_window(value, before):
    detector, without = fed(LOSSES[:before]), fed(LOSSES[:before])
    assert math.isnan(detector.update(value))
    assert detector.state_dict() == without.state_dict()
    after = LOSSES[before : before + 150]
    assert bits([detector.update(x) for x in after]) == bits([without.update(x) for x in after])


# ---- what is skipped -------------------------------------------------------------------------------------------------


def guard_after(losses, norms=None, **limits) -> Guard:
    guard = Guard(**limits)
    for i, loss in enumerate(losses):
        guard.judge(loss, norms[i] if norms else loss)
    return guard


def test_without_limits_only_what_is_not_finite_is_skipped():
    guard = guard_after(LOSSES)
    verdict = guard.judge(1e6, 1e7)
    assert verdict.loss_z > 11 and verdict.norm_z > 11 and not verdict.reason
    assert guard.judge(math.nan, 1.0).reason == "loss nan, gradient norm 1"
    assert guard.judge(1.0, math.inf).reason == "loss 1, gradient norm inf"
    assert (guard.skipped, guard.in_a_row, guard.diverged) == (2, 2, True)
    assert not guard.judge(3.0, 3.0).reason
    assert (guard.skipped, guard.in_a_row, guard.diverged) == (2, 0, False)


def test_the_reason_has_value_z_score_and_limit_the_loss_s_first():
    z = fed(LOSSES).update(9.0)
    both = guard_after(LOSSES, loss_limit=3, norm_limit=3)
    assert both.judge(9.0, 9.0).reason == f"loss 9.0000, z-score {z:.2f}, above 3"
    assert not both.diverged and both.in_a_row == 1
    norm = guard_after(LOSSES, norm_limit=2.5)
    assert norm.judge(9.0, 9.0).reason == f"gradient norm 9.0000, z-score {z:.2f}, above 2.5"
    assert guard_after(LOSSES, loss_limit=3).judge(3.0, 9.0).reason == ""


def test_a_z_score_must_be_greater_than_the_limit_and_upward():
    z = fed(LOSSES).update(9.0)
    assert not guard_after(LOSSES, loss_limit=z).judge(9.0, 3.0).reason
    assert guard_after(LOSSES, loss_limit=math.nextafter(z, 0)).judge(9.0, 3.0).reason
    assert not guard_after(LOSSES, loss_limit=3, norm_limit=3).judge(-9.0, -9.0).reason


def test_nothing_stands_out_while_the_window_fills():
    guard = Guard(1e-9, 1e-9)
    assert not any(guard.judge(10.0**i, 10.0**i).reason for i in range(WINDOW))
    assert guard.judge(1e140, 0.0).reason


def test_a_skipped_step_is_in_both_windows():
    """As in llm.c; else one jump would skip everything that follows."""
    guard, detector = guard_after(LOSSES, loss_limit=3), fed(LOSSES)
    assert guard.judge(9.0, 9.0).reason and detector.update(9.0)
    verdict = guard.judge(9.0, 9.0)
    assert verdict.loss_z == verdict.norm_z == detector.update(9.0)


def test_a_norm_alone_may_be_no_number():
    guard = guard_after(LOSSES[:WINDOW])
    verdict = guard.judge(5.0, math.nan)
    assert verdict.loss_z > 0 and math.isnan(verdict.norm_z) and verdict.reason


# ---- the state -------------------------------------------------------------------------------------------------------

FLOATS = st.floats(-LARGEST, LARGEST)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(FLOATS, max_size=300), st.lists(FLOATS, max_size=5))
def test_a_detector_goes_on_bit_for_bit(before, after):
    detector, again = fed(before), Detector()
    again.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    assert bits(again.state_dict()["values"]) == bits(before[-WINDOW:])
    assert bits([again.update(x) for x in after]) == bits([detector.update(x) for x in after])


def test_any_kind_of_number_may_come():
    detector = fed([1, np.float32(0.1), np.float64(2.5)])
    assert json.dumps(detector.state_dict()) == '{"values": [1.0, 0.10000000149011612, 2.5]}'


@pytest.mark.parametrize("saved_at", [0, 1, 127, 128, 129, 250, 301, 303, 400])
def test_a_guard_goes_on_bit_for_bit(saved_at):
    losses, norms = LOSSES.copy(), [1 + loss / 2 for loss in LOSSES]
    losses[130], norms[250], norms[300] = 30.0, 40.0, 50.0
    losses[301:303] = math.nan, math.inf
    guard, again = Guard(3, 5), Guard(3, 5)
    for step in range(saved_at):
        guard.judge(losses[step], norms[step])
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for step in range(saved_at, 400):
        verdicts = guard.judge(losses[step], norms[step]), again.judge(losses[step], norms[step])
        assert verdicts[0].reason == verdicts[1].reason and bits(verdicts[0][:2]) == bits(verdicts[1][:2])
    assert again.state_dict() == guard.state_dict() and again.skipped >= 5


def test_a_guard_is_blind_while_it_has_limits_and_no_numbers():
    assert Guard(3, 0).blind and Guard(0, 3).blind and not Guard().blind
    assert not guard_after([1.0], loss_limit=3).blind


VALUES = st.lists(st.none() | st.booleans() | st.integers() | st.floats() | st.just("1.0"), max_size=200)


@given(JSON | st.fixed_dictionaries({"values": VALUES}) | st.builds(dict, values=VALUES, more=st.none()))
def test_a_detector_takes_a_state_or_stays_as_it_is(state):
    detector = fed(LOSSES[:10])
    before = detector.state_dict()
    try:
        detector.load_state_dict(state)
    except ValueError as error:
        assert "\n" not in str(error) and detector.state_dict() == before
    else:
        assert detector.state_dict() == state


@given(st.data())
def test_a_guard_takes_no_state_with_a_wrong_field(data):
    guard = guard_after([*LOSSES, math.nan])
    before = copy.deepcopy(guard.state_dict())
    state = guard.state_dict()
    name = data.draw(st.sampled_from(list(state)))
    if data.draw(st.booleans()):
        del state[name]
    else:
        # 1 is the only right number of updates skipped here, or 1 of more.
        state[name] = data.draw(JSON.filter(lambda value: not (isinstance(value, int) and value >= 0)))
    with pytest.raises(ValueError, match="^[^\n]+$"):
        guard.load_state_dict(state)
    assert guard.state_dict() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"skipped": -1, "in_a_row": -1}, {"skipped": 0}, {"in_a_row": 2}, {"in_a_row": 0}, {"skipped": True},
        {"skipped": 2**31}, {"skipped": 1.0}, {"diverged": 1}, {"diverged": None}, {"more": 0},
        {"norm": {"values": [1.0, float("nan")]}}, {"norm": {"values": [1]}}, {"loss": {"values": [0.0] * 129}},
    ],
)  # fmt: skip
def test_bad_states_of_a_guard(changes):
    guard = guard_after([*LOSSES, math.nan])
    before = copy.deepcopy(guard.state_dict())
    with pytest.raises(ValueError, match="^[^\n]+$"):
        guard.load_state_dict(before | changes)
    assert guard.state_dict() == before
