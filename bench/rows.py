"""What the tables of targets are made of: the records of a match, and rows that hold figures to bounds.

Called by compare.py, targets.py and targets_cuda.py.
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

    def limit(self, name, contestant):
        """The least seconds that a GPU could take: at the rate of its largest products, or of its copies."""
        info = self.info(name, contestant)
        return max(info["flops"] / self.roof(name, "gemm").best, info["bytes"] / self.roof(name, "device-copy").best)


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
    unit: str = "x"  # "x": a ratio, "%": a share, "ms" of seconds, or what the figure is in
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
        special = {"%": f"{100 * number:.1f} %", "x": f"{number:.2f} x", "ms": f"{1000 * number:.0f} ms"}
        return special.get(self.unit) or f"{number:,.0f} {self.unit}"


def worst(results, names, value, make):
    """The row of the benchmark with the lowest value, and how many there were."""
    values = [(value(name), name) for name in names]
    if values:
        lowest, name = min(values, key=lambda pair: pair[0].best)
        row = make(name, lowest)
        row.shape = name.partition(": ")[2] + (f", the lowest of {len(values)}" if len(values) > 1 else "")
        yield row


def share_of_roof(results, names, what, bound, probe="fma", amount="flops", ours="cpu"):
    """The lowest share of what the probe gave: operations of the peak, or bytes of the bandwidth."""

    def value(name):
        amounts = Pair(results.info(name, ours)[amount], results.info(name, ours)[amount])
        return amounts / results.seconds(name, ours) / results.roof(name, probe)

    def make(name, share):
        unit, roof = results.info(name, probe)["unit"], results.roof(name, probe).best / 1e9
        return Row(what, bound, share, ours=f"{share.best * roof:.4g} {unit}", theirs=f"{probe} {roof:.4g}", unit="%")

    yield from worst(results, [name for name in names if results.has(name, ours, probe)], value, make)


def faster(results, names, peer, what, bound):
    """The lowest ratio of the peer's time to ours."""

    def value(name):
        return results.seconds(name, peer) / results.seconds(name, "cpu")

    def make(name, ratio):
        ours, theirs = (duration(results.seconds(name, who).best) for who in ("cpu", peer))
        return Row(what, bound, ratio, ours=ours, theirs=f"{peer} {theirs}")

    yield from worst(results, [name for name in names if results.has(name, "cpu", peer)], value, make)
