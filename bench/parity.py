"""Ten training steps of pyllmc on a GPU and of PyTorch beside it, from the same weights on the same batch.

    python bench/parity.py                           GPT-2 124M, 4 x 1024 tokens of Shakespeare
    python bench/parity.py --json FILE

pyllmc trains in float32 and in bfloat16, PyTorch in float32 without TF32 on the same device; the table has the losses
of each step. A loss in float32 may differ by FLOAT32_BOUND, one in bfloat16 by BFLOAT16_BOUND; the program fails where
one differs by more. gpu_check.sh runs it; calls torch_reference.py.
"""

import json
import sys
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402
import torch_reference  # noqa: E402

from pyllmc import AdamW, backend, cli  # noqa: E402
from pyllmc.model import GPT2  # noqa: E402

STEPS = 10
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-4, 0.02
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1


def our_losses(ops, config, flat, inputs, targets):
    """inputs and targets (B,T) int32 -> the losses of STEPS steps."""
    model = GPT2(config, ops=ops, params=flat.copy())
    optimizer = AdamW(model, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    losses = []
    for _ in range(STEPS):
        losses.append(float(model.forward_backward(inputs, targets)))
        optimizer.step()
        model.zero_grad()
    return losses


def torch_losses(config, flat, inputs, targets, device):
    """The same of PyTorch in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = torch_reference.TorchGPT2(config, flat).to(device)
    optimizer = torch_reference.make_optimizer(model, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    inputs, targets = (torch.from_numpy(tokens).long().to(device) for tokens in (inputs, targets))
    losses = []
    for _ in range(STEPS):
        _, loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def measure(device, config, flat, inputs, targets, torch_device):
    """{"torch": losses, "float32": losses, "bfloat16": losses}; `device` is the module of a GPU's ops."""
    device.product_options(tf32=False)
    losses = {"torch": torch_losses(config, flat, inputs, targets, torch_device)}
    for dtype in ("float32", "bfloat16"):
        losses[dtype] = our_losses(device.op_set(dtype), config, flat, inputs, targets)
    return losses


def report(losses):
    """(lines of a table, what differs the most by type, whether all of it is within the bounds)"""
    lines = [f"{'step':>4}  {'PyTorch':>10}  {'float32':>10}  {'differs':>9}  {'bfloat16':>10}  {'differs':>9}"]
    differences = {dtype: [] for dtype in ("float32", "bfloat16")}
    for step, right in enumerate(losses["torch"]):
        cells = f"{step + 1:4}  {right:10.6f}"
        for dtype, found in differences.items():
            found.append(abs(losses[dtype][step] - right))
            cells += f"  {losses[dtype][step]:10.6f}  {found[-1]:9.2e}"
        lines.append(cells)
    bounds = {"float32": FLOAT32_BOUND, "bfloat16": BFLOAT16_BOUND}
    # A NaN is within nothing.
    within = all(each <= bounds[dtype] for dtype, found in differences.items() for each in found)
    largest = {dtype: max(found, key=lambda each: (each != each, each)) for dtype, found in differences.items()}
    words = ", ".join(f"{dtype} differs by {value:.1e} ({bounds[dtype]:g})" for dtype, value in largest.items())
    return [*lines, f"at most, and allowed: {words}"], largest, within


def main(argv=None):
    parser = cli.ArgumentParser(prog="bench/parity.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--init", default="d12", metavar="SIZE", help="the model's size (default: %(default)s)")
    parser.add_argument("--batch-size", type=cli.positive_int, default=4, metavar="N")
    parser.add_argument("--seq-len", type=cli.positive_int, default=1024, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses here")
    args = parser.parse_args(argv)
    ops = backend("cuda")
    tokens = ["--init", args.init, "--batch-size", str(args.batch_size), "--seq-len", str(args.seq_len)]
    config, flat, tokens, _ = torch_reference.load(torch_reference.parse_arguments(tokens))
    batch = next(torch_reference.batches(tokens, args.batch_size, args.seq_len, same=True))
    inputs, targets = (part.numpy().astype("int32") for part in batch)
    losses = measure(ops, config, flat, inputs, targets, "cuda")
    lines, differs, within = report(losses)
    print("\n".join(lines))
    if args.json:
        result = {"device": ops.device()["name"], "model": args.init, "shape": inputs.shape, "within": within}
        args.json.write_text(json.dumps(result | {"losses": losses, "differs": differs}, indent=1) + "\n")
    if not within:
        raise ValueError("the losses differ by more than is allowed")


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
