"""What pyllmc is to reach on one H200, as rows of the table of targets, and a table of its training steps.

Called by targets.py. Tokens a second are those of whole training steps in bfloat16; MFU is 6 N + 6 L C T operations a
token over the datasheet's peak, as llm.c counts it; attention's operations are those of the pairs that it may see.
"""

from rows import Pair, Row, duration, share_of_roof

H200_FLOPS = 989e12  # dense bfloat16
PEERS = ("torch-compile", "torch-graphs")
MIB, GIB = 2**20, 2**30


def rows(results):
    """Every target of which there are results, in order."""
    for part in (_speed, _small_batch, _memory_of_a_sequence, _large, _bandwidth, _attention):
        yield from part(results)


def _size(results, name):
    return next(iter(results.records[name].values()))["extra_info"]["sizes"]


def _names(results, group, contestant):
    return [name for name in results.benchmarks(group) if results.has(name, contestant)]


def _tokens_per_second(results, name, contestant):
    sizes = _size(results, name)
    return Pair(sizes["B"] * sizes["T"], sizes["B"] * sizes["T"]) / results.seconds(name, contestant)


def _mfu(results, name, contestant="cuda"):
    flops = results.info(name, contestant)["flops"]
    return Pair(flops, flops) / results.seconds(name, contestant) / H200_FLOPS


def _fastest(results, group, contestant):
    """(tokens a second, benchmark) of the batch that gives the most; None where it did none."""
    found = [(_tokens_per_second(results, name, contestant), name) for name in _names(results, group, contestant)]
    return max(found, key=lambda pair: pair[0].best, default=None)


def _batch(results, name):
    return f"B={_size(results, name)['B']}"


def _speed(results):
    ours = _fastest(results, "gpu-step", "cuda")
    if ours is None:
        return
    speed, name = ours
    shape = f"{_batch(results, name)}, the fastest"
    mfu = f"{100 * _mfu(results, name).best:.1f} % MFU"
    yield Row("training, the public frontier", 490e3, speed, ours=mfu, unit="tok/s", shape=shape)
    theirs = _fastest(results, "gpu-step", "torch-compile")
    if theirs is not None:
        rate = f"torch-compile {theirs[0].best / 1e3:.1f}k, {_batch(results, theirs[1])}"
        yield Row("training over torch.compile", 1.1, speed / theirs[0], ours=mfu, theirs=rate, shape=shape)
    yield Row("training, excellent", 564e3, speed, ours=mfu, unit="tok/s", shape=shape)


def _small_batch(results):
    names = [name for name in _names(results, "gpu-step", "cuda") if any(results.has(name, peer) for peer in PEERS)]
    if names:
        name = min(names, key=lambda name: _size(results, name)["B"])
        ours = results.seconds(name, "cuda")
        seconds, peer = min(
            ((results.seconds(name, peer), peer) for peer in PEERS if results.has(name, peer)),
            key=lambda pair: pair[0].best,
        )
        yield Row(
            "fine-tuning step over torch.compile's better mode", 1.3, seconds / ours, ours=duration(ours.best),
            theirs=f"{peer} {duration(seconds.best)}", shape=_batch(results, name),
        )  # fmt: skip


def _memory_of_a_sequence(results):
    """What a larger batch takes more than a smaller one."""
    held = {}
    for name in _names(results, "gpu-recompute", "cuda"):
        held[_size(results, name)["B"]] = results.info(name, "cuda")["device_bytes"]
    if len(held) > 1:
        (few, less), (many, more) = min(held.items()), max(held.items())
        mebibytes = (more - less) / (many - few) / MIB
        yield Row(
            "memory of a sequence, recompute 1", 235, Pair(mebibytes, mebibytes), at_least=False,
            ours=f"{more / GIB:.2f} GiB", theirs="llm.c 331 MiB", unit="MiB", shape=f"B={few} and B={many}",
        )  # fmt: skip


def _large(results):
    names = _names(results, "gpu-large", "cuda")
    if names:
        name = max(names, key=lambda name: _size(results, name)["B"])
        speed = _tokens_per_second(results, name, "cuda").best
        yield Row(
            "the largest model, MFU", 0.52, _mfu(results, name), ours=f"{speed / 1e3:.1f}k tok/s", unit="%",
            shape=f"{_batch(results, name)}, the largest",
        )  # fmt: skip


def _bandwidth(results):
    for name in list(results.benchmarks("gpu-memory")):
        title = name.partition(": ")[2].partition("-")[0].replace("_", " ")
        yield from share_of_roof(
            results, [name], f"{title}, of copy bandwidth", 0.85, "device-copy", "bytes", ours="cuda"
        )


def _attention(results):
    names = _names(results, "gpu-attention", "cuda")
    forward = {str(_size(results, n)): n for n in names if results.info(n, "cuda")["what"] == "attention_forward"}
    backward = {str(_size(results, n)): n for n in names if results.info(n, "cuda")["what"] == "attention_backward"}
    for sizes, name in forward.items():
        yield _rate(results, "attention forward", 230, [name])
        if sizes in backward:
            yield _rate(results, "attention forward and backward", 190, [name, backward[sizes]])


def _rate(results, what, bound, names):
    """TFLOP/s of these calls one after the other, ours and PyTorch's."""
    flops = sum(results.info(name, "cuda")["flops"] for name in names) / 1e12

    def seconds(contestant):
        return sum((results.seconds(name, contestant) for name in names), Pair(0.0, 0.0))

    theirs = ""
    if all(results.has(name, "torch") for name in names):
        theirs = f"torch {flops / seconds('torch').best:.0f} TFLOP/s"
    rate = Pair(flops, flops) / seconds("cuda")
    return Row(what, bound, rate, theirs=theirs, unit="TFLOP/s", shape=names[0].partition("-")[2].partition("-")[2])


# ---- the steps -------------------------------------------------------------------------------------------------------


def steps(results):
    """The cells of a table of all training steps; none where there are none."""
    groups = ("gpu-step", "gpu-recompute", "gpu-large")
    names = [name for group in groups for name in results.benchmarks(group)]
    if names:
        yield "step", "B", "recompute", "contestant", "tok/s", "ms", "MFU", "GiB"
    for name in names:
        sizes = _size(results, name)
        for contestant, record in results.records[name].items():
            held = record["extra_info"].get("device_bytes")
            yield (
                f"{sizes['L']} layers of {sizes['C']}, T={sizes['T']}", str(sizes["B"]),
                str(sizes.get("recompute", 0)) if contestant == "cuda" else "", contestant,
                f"{_tokens_per_second(results, name, contestant).best:,.0f}",
                f"{1000 * results.seconds(name, contestant).best:.2f}",
                f"{100 * _mfu(results, name, contestant).best:.1f} %", f"{held / GIB:.2f}" if held else "",
            )  # fmt: skip
