"""Each peer computes what pyllmc's op computes, so that like is compared with like."""

import cases
import contestants
import models
import numpy as np
import peers
import pytest
import suite

from pyllmc import backend

pytestmark = pytest.mark.filterwarnings("default")

# Which outputs a peer leaves out, or has under another name: statistics for its own backward.
COMPARED = {"attention_forward": ("out",)}
HAS = {"numpy": peers.has_numpy, "torch": peers.has_torch}
MAKE = {"numpy": peers.numpy_op, "torch": peers.torch_op}
PEERS = [name for name in contestants.installed() if name in HAS]
TINY = suite.benchmarks("tiny")


def pairs():
    for peer in PEERS:
        for op, op_cases in cases.CASES.items():
            # A scalar is no row, and a bare list of numbers is none of GPT-2's shapes.
            found = [case for case in op_cases if HAS[peer](case) and dict(case.sizes).get("leading") != ()]
            if found:
                yield peer, op, found


@pytest.mark.parametrize("peer, op, op_cases", list(pairs()), ids=lambda value: value if isinstance(value, str) else "")
def test_peer_computes_the_same(peer, op, op_cases):
    for case in op_cases:
        ours_call, call = cases.make(case), cases.make(case)
        arrays = {name: np.asarray(array, order="C") for name, array in ours_call.arrays.items()}
        ours = getattr(backend("cpu"), op)(**ours_call.inputs | arrays)
        theirs = MAKE[peer](call)()
        if ours_call.in_place:
            ours = [arrays[name] for name in ours_call.in_place]
        ours = [part for part in (ours if isinstance(ours, (tuple, list)) else [ours]) if part is not None]
        names = COMPARED.get(op, list(call.outputs))
        theirs = [part for part in theirs if part is not None]
        if names and not ours_call.in_place:
            ours, theirs = ours[: len(names)], theirs[: len(names)]
        assert len(ours) == len(theirs), case
        for mine, other in zip(ours, theirs, strict=True):
            mine, other = np.asarray(mine), np.asarray(other)
            if mine.shape != other.shape and mine.size >= other.size and mine.ndim:  # the padding rows of wte
                assert not mine[len(other) :].any(), case
                mine = mine[: len(other)]
            np.testing.assert_allclose(mine.ravel(), other.ravel(), rtol=2e-4, atol=2e-4, err_msg=str(case))


def model_results(what, group):
    (entry,) = [entry for entry in TINY if entry.what == what and entry.group == group]
    sizes, cpu = dict(entry.sizes), backend("cpu")
    yield models.make(what, sizes, "pyllmc", cpu)
    for name in contestants.installed():
        if name in entry.others and name in ("torch", "transformers"):
            yield models.make(what, sizes, name)


def test_steps_have_the_same_losses():
    losses = [[float(step()) for _ in range(3)] for step in model_results("step", "step")]
    assert losses[0][0] > losses[0][2]
    for others in losses[1:]:
        np.testing.assert_allclose(others, losses[0], rtol=1e-5)


@pytest.mark.parametrize("what", ["generate", "prefill"])
def test_generated_tokens_are_the_same(what):
    tokens = [[call(), call()] for call in model_results(what, "generation")]
    assert all(first == second == tokens[0][0] for first, second in tokens)
