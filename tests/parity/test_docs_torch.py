"""The code of the documents that compare with PyTorch, all of it in order: it prints what they show."""

import doctext
import pytest

from pyllmc import get_num_threads, set_num_threads

torch = pytest.importorskip("torch")

WITH_TORCH = [path for path in doctext.DOCUMENTS if any(block.needs_torch for block in doctext.python_blocks(path))]


@pytest.fixture(autouse=True)
def as_before():
    """Threads and random numbers are the process's."""
    threads, torch_threads, state = get_num_threads(), torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(torch_threads)
    set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.mark.parametrize("document", WITH_TORCH, ids=lambda path: path.name)
def test_code_runs_and_prints_what_is_shown(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    doctext.run(doctext.python_blocks(document))


def test_a_gradient_of_a_gradient_raises():
    """As docs/torch_bridge.md says."""
    path = doctext.ROOT / "docs" / "torch_bridge.md"
    layernorm = doctext.run(doctext.python_blocks(path)[:1])["LayerNorm"]
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((3, 8), (8,), (8,)))
    (gradient,) = torch.autograd.grad(layernorm.apply(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
