"""The table of targets: what pyllmc is to reach, what it reached in these results, and what the peers did.

`table(data)` reads the merged JSON of compare.py. Every figure is the best of the rounds, held to the best that the
probe or the peer gave in the same rounds; the same of the medians stands beside it in brackets.
"""

import statistics
from dataclasses import dataclass, field

# ---- reading the results ---------------------------------------------------------------------------------------------


@dataclass
class Results:
    """The records by benchmark and contestant."""

    records: dict = field(default_factory=dict)

    @classmethod
    def of(cls, data):
        found = cls()
        for record in data["benchmarks"]:
            info = record["extra_info"]
            found.records.setdefault(info["benchmark"], {})[info["contestant"]] = record
        return found

    def benchmarks(self, group, what=None, **sizes):
        """(name, sizes) of those with these sizes, which may be conditions."""
        for name, players in self.records.items():
            info = next(iter(players.values()))["extra_info"]
            if info["group"] == group and what in (None, info["what"]):
                have = next(p["extra_info"]["sizes"] for p in players.values())
                if all(want(have[k]) if callable(want) else have[k] == want for k, want in sizes.items()):
                    yield name

    def has(self, name, *contestants):
        return all(contestant in self.records[name] for contestant in contestants)

    def info(self, name, contestant="cpu"):
        return self.records[name][contestant]["extra_info"]

    def seconds(self, name, contestant):
        """(best, median)"""
        stats = self.records[name][contestant]["stats"]
        return Pair(stats["min"], stats["median"])

    def roof(self, name, probe):
        """(best, median) of a probe, in operations or bytes a second."""
        figures = self.info(name, probe)["figures"]
        return Pair(max(figures) * 1e9, statistics.median(figures) * 1e9)


@dataclass(frozen=True)
class Pair:
    """The same figure of the best rounds and of the median ones."""

    best: float
    median: float

    def __truediv__(self, other):
        return self.with_(other, lambda a, b: a / b)

    def __mul__(self, other):
        return self.with_(other, lambda a, b: a * b)

    def __add__(self, other):
        return self.with_(other, lambda a, b: a + b)

    def __sub__(self, other):
        return self.with_(other, lambda a, b: a - b)

    def with_(self, other, combine):
        other = other if isinstance(other, Pair) else Pair(other, other)
        return Pair(combine(self.best, other.best), combine(self.median, other.median))


def figure(record):
    """A record's best round, for people."""
    info = record["extra_info"]
    if "figures" in info:
        return f"{max(info['figures']):.0f} {info['unit']}"
    return duration(record["stats"]["min"])


def duration(seconds):
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


# ---- the rows --------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One target. `shape` says which benchmark decided it, where a worst one of several did."""

    what: str
    bound: float
    value: Pair
    at_least: bool = True
    ours: str = ""
    theirs: str = ""
    unit: str = "x"  # "x": a ratio, "%": a share, "ms"
    shape: str = ""

    @property
    def met(self):
        return self.value.best >= self.bound if self.at_least else self.value.best <= self.bound

    def cells(self):
        sign = ">=" if self.at_least else "<="
        value = f"{self.show(self.value.best)} [{self.show(self.value.median)}]"
        verdict = "met" if self.met else "MISSED"
        return self.what, f"{sign} {self.show(self.bound)}", value, self.ours, self.theirs, verdict, self.shape

    def show(self, number):
        return {"%": f"{100 * number:.1f} %", "x": f"{number:.2f} x", "ms": f"{1000 * number:.0f} ms"}[self.unit]


def rows(results):
    """Every target of which there are results, in order."""
    for part in (_products, _attention, _memory, _cache, _classifier, _step, _long, _character, _generation, _import):
        yield from part(results)


def _worst(results, names, value, make):
    """The row of the benchmark with the lowest value, and how many there were."""
    values = [(value(name), name) for name in names]
    if values:
        lowest, name = min(values, key=lambda pair: pair[0].best)
        row = make(name, lowest)
        row.shape = name.partition(": ")[2] + (f", the lowest of {len(values)}" if len(values) > 1 else "")
        yield row


def _share(results, names, what, bound, probe="fma", amount="flops"):
    """The lowest share of what the probe gave: operations of the peak, or bytes of the bandwidth."""

    def value(name):
        amounts = Pair(results.info(name)[amount], results.info(name)[amount])
        return amounts / results.seconds(name, "cpu") / results.roof(name, probe)

    def make(name, share):
        unit, roof = results.info(name, probe)["unit"], results.roof(name, probe).best / 1e9
        return Row(what, bound, share, ours=f"{share.best * roof:.4g} {unit}", theirs=f"{probe} {roof:.4g}", unit="%")

    yield from _worst(results, [name for name in names if results.has(name, "cpu", probe)], value, make)


def _faster(results, names, peer, what, bound):
    """The lowest ratio of the peer's time to ours."""

    def value(name):
        return results.seconds(name, peer) / results.seconds(name, "cpu")

    def make(name, ratio):
        ours, theirs = (duration(results.seconds(name, who).best) for who in ("cpu", peer))
        return Row(what, bound, ratio, ours=ours, theirs=f"{peer} {theirs}")

    yield from _worst(results, [name for name in names if results.has(name, "cpu", peer)], value, make)


def _products(results):
    for op, title in (("matmul_forward", "forward"), ("matmul_backward", "dinp, dweight")):
        for bound, rows_of, wanted in ((0.88, "M >= 1024", lambda M: M >= 1024), (0.84, "M = 256", lambda M: M == 256)):
            names = results.benchmarks("products", op, leading=lambda shape, wanted=wanted: wanted(shape[0]))
            yield from _share(results, names, f"product {title}, {rows_of}, of peak", bound)
    for peer, mean_bound in (("torch", 1.5), ("numpy", 1.1)):
        names = [name for name in results.benchmarks("products") if results.has(name, "cpu", peer)]
        if names:
            ratios = [results.seconds(name, peer) / results.seconds(name, "cpu") for name in names]
            mean = Pair(*(statistics.geometric_mean(getattr(r, key) for r in ratios) for key in ("best", "median")))
            yield Row(f"products over {peer}, geometric mean", mean_bound, mean, shape=f"{len(names)} products")
            yield from _faster(results, names, peer, f"products over {peer}, lowest", 0.95)


def _attention(results):
    for op in ("attention_forward", "attention_backward"):
        title = op.replace("_", " ")
        yield from _faster(results, results.benchmarks("attention", op), "torch", f"{title} over torch", 2.0)
        for bound, rows_of, wanted in ((0.55, "T >= 256", lambda T: T >= 256), (0.35, "T = 64", lambda T: T == 64)):
            names = results.benchmarks("attention", op, T=wanted)
            yield from _share(results, names, f"{title}, {rows_of}, of peak", bound)


def _memory(results):
    for name in list(results.benchmarks("memory")):
        for probe in ("copy", "read", "update"):
            title = results.info(name)["what"].replace("_", " ") if results.has(name, "cpu") else ""
            yield from _share(results, [name], f"{title}, of bandwidth", 0.85, probe, "bytes")


def _cache(results):
    for name in list(results.benchmarks("cache")):
        title = name.partition(": ")[2].partition("-")[0].replace("_", " ")
        yield from _faster(results, [name], "torch", f"{title} over torch, in cache", 1.3)


def _classifier(results):
    for name in results.benchmarks("classifier"):
        if results.has(name, "cpu", "cpu-products"):
            ours, bare = results.seconds(name, "cpu"), results.seconds(name, "cpu-products")
            yield Row(
                "classifier over its three products", 1.05, ours / bare, at_least=False, ours=duration(ours.best),
                theirs=f"products {duration(bare.best)}", shape=name.partition("-")[2],
            )  # fmt: skip


def _step(results):
    for name in results.benchmarks("step"):
        for peer in ("torch", "torch-compile"):
            yield from _faster(results, [name], peer, f"step T=64 over {peer}", 1.6)
        if results.has(name, "cpu", "fma", "update"):
            info, ours = results.info(name), results.seconds(name, "cpu")
            limit = Pair(info["flops"], info["flops"]) / (results.roof(name, "fma") * 0.85)
            limit += Pair(info["bytes"], info["bytes"]) / results.roof(name, "update")
            yield Row(
                "step T=64 over its limit", 1.12, ours / limit, at_least=False, ours=duration(ours.best),
                theirs=f"limit {duration(limit.best)}",
            )  # fmt: skip
        yield from _faster(results, [name], "llmc", "step T=64 over llm.c", 1.0)


def _long(results):
    for name in results.benchmarks("long"):
        sizes = f"step B={results.info(name)['sizes']['B']} T={results.info(name)['sizes']['T']}"
        yield from _faster(results, [name], "torch", f"{sizes} over torch", 1.4)
        yield from _share(results, [name], f"{sizes}, of peak", 0.78)
        ours, theirs = (results.records[name].get(who, {}).get("extra_info", {}) for who in ("cpu", "torch"))
        if "peak_rss" in ours and "peak_rss" in theirs:
            share = ours["peak_rss"] / theirs["peak_rss"]
            gib = [f"{info['peak_rss'] / 2**30:.2f} GiB" for info in (ours, theirs)]
            yield Row(
                f"{sizes}, memory of torch's", 0.6, Pair(share, share), at_least=False, ours=gib[0],
                theirs=f"torch {gib[1]}",
            )  # fmt: skip
        if results.has(name, "cpu", "cpu-1t", "fma", "fma-1t"):
            scaling = results.seconds(name, "cpu-1t") / results.seconds(name, "cpu")
            roof = results.roof(name, "fma") / results.roof(name, "fma-1t")
            yield Row(
                f"{sizes}, all threads over one, of fma's", 0.95, scaling / roof, ours=f"{scaling.best:.2f} x",
                theirs=f"fma {roof.best:.2f} x",
            )  # fmt: skip


def _character(results):
    yield from _faster(results, results.benchmarks("character"), "torch", "character model over torch", 2.0)


def _generation(results):
    generate, prefill = (list(results.benchmarks("generation", what)) for what in ("generate", "prefill"))
    yield from _share(results, generate, "generation, of read bandwidth", 0.85, "read", "bytes")
    yield from _faster(results, generate, "transformers", "generation over transformers", 1.5)
    yield from _share(results, prefill, "prefill, of peak", 0.70)


def _import(results):
    for name in results.benchmarks("import"):
        if results.has(name, "cpu", "numpy"):
            ours, numpy = results.seconds(name, "cpu"), results.seconds(name, "numpy")
            yield Row(
                "import pyllmc, its model and ops, over numpy's", 0.06, ours - numpy, at_least=False,
                ours=duration(ours.best), theirs=f"numpy {duration(numpy.best)}", unit="ms",
            )  # fmt: skip


# ---- printing --------------------------------------------------------------------------------------------------------


def table(data, details=False):
    """The targets as aligned lines, below what they must be read with; `details` adds every benchmark."""
    machine, results = data["machine_info"].get("pyllmc", {}), Results.of(data)
    lines = [
        ", ".join(str(machine.get(key)) for key in ("processor", "isa", "compiler"))
        + f", {machine.get('threads')} threads",
        f"suite {data.get('suite')}, {data['datetime']}; best of the rounds [median of the rounds]",
        "",
    ]
    if details:
        lines += _aligned(_detail_cells(results)) + [""]
    found = list(rows(results))
    head = ("target", "wanted", "reached", "pyllmc", "beside", "", "decided by")
    lines += _aligned([head, *(row.cells() for row in found)])
    lines += ["", f"{sum(row.met for row in found)} of {len(found)} targets met"]
    lines += [f"error: {who}: {what}: {why}" for who, what, why in data.get("errors", [])]
    return "\n".join(lines)


def _detail_cells(results):
    yield "benchmark", "contestant", "best", "median", "rounds", "GFLOP/s", "GB/s"
    for name, players in results.records.items():
        for contestant, record in players.items():
            info, stats = record["extra_info"], record["stats"]
            if "figures" in info:
                cells = (figure(record), f"{statistics.median(info['figures']):.0f}", str(len(info["figures"])), "", "")
            else:
                rates = (f"{info[k] / stats['min'] / 1e9:.3g}" if info[k] else "" for k in ("flops", "bytes"))
                cells = (duration(stats["min"]), duration(stats["median"]), str(stats["rounds"]), *rates)
            yield (name, contestant, *cells)


def _aligned(cells):
    cells = [list(row) for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
