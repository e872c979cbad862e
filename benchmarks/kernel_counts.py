"""What each step of the chain's kernels reads and writes, and the time that each form needs at least for it.

    python benchmarks/kernel_counts.py                          # BERT-base's sizes, an H200 and an A100
    python benchmarks/kernel_counts.py --write docs/kernels.md  # the tables there

Bytes are those that programs ask for: most come from the cache, whose rate is assumed below. tests/kernels/
test_traffic.py holds the formulas to what the kernels do in Triton's interpreter. Times are predictions.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from bench_record import markdown, replace_between
from roofline import SHEETS, DataSheet, gate_flops

from lad_fast.kernels import launch

# By step: whether a chain of n gates has n of them, (loads, stores) in bytes of one. Names: see Counts. Left out are
# masks, bounds of packed examples, and what an example's or row's mean and rstd take.
FORMULAS = {
    "forward, weights cast": ("4*D*D", "w*D*D"),
    "forward, product": (
        "N*T*D*s + M*D*D*w + 4*M*D + 2*T*D*s",
        "g*T*D*s + T*D*s + 12*M*X*Y",
    ),
    "forward, norm": (
        "T*D*s + 8*T*D + 12*M*N*X*Q*Y",
        "T*D*s",
    ),
    "forward, both in one": (
        "N*T*D*s + M*D*D*w + 4*M*D + 2*T*D*s + 8*T*D + 12*M*N*X*Q*Y",
        "g*T*D*s + T*D*s + 12*M*X*Y",
    ),
    "forward, behind cuBLAS": (
        "3*T*D*s + 4*M*D + 8*T*D + 12*M*N*X*Q*Y",
        "g*T*D*s + T*D*s + 12*M*X*Y",
    ),
    "forward, a student's loss": ("T*D*s", "4*M*Y"),
    "backward, product": (
        "N*T*D*w + M*D*D*w + 2*T*D*s + 8*T*D",
        "T*D*s + 12*M*X*Y",
    ),
    "backward, gates again": ("N*T*D*s + M*D*D*w + 4*M*D", "T*D*s"),
    "backward, gate": (
        "4*T*D*s + 4*G*S*D + 12*P*C*E*Q*Y",
        "T*D*w + T*D*s + 8*G*S*D + 4*G*P*D",
    ),
    "backward, a student's gradient": ("T*D*s", "T*D*s"),
    "backward, sums": ("8*G*S*D + 4*G*P*D", "8*S*D + 4*D"),
    "hidden loss alone, forward": ("2*T*D*s", "0"),
    "hidden loss alone, backward": ("2*T*D*s", "2*T*D*s"),
}
PRODUCTS = ("forward, product", "forward, both in one", "backward, product", "backward, gates again")  # 2 T D^2 FLOP
STUDENT_STEPS = ("forward, a student's loss", "backward, a student's gradient")
LAUNCH_SECONDS, BARRIER_SECONDS = 2e-6, 1.5e-6  # assumed: between dependent launches; of a wait for all programs


@dataclass(frozen=True)
class Machine:
    """A GPU to predict for. The rate at which its cache delivers is assumed: nobody measured it here."""

    sheet: DataSheet
    architecture: str
    multiprocessors: int
    cache_bytes_per_second: float

    def counts(self) -> "Counts":
        """The published batch in bfloat16, with the largest tile that the GPU takes."""
        tile = launch.GEMM[self.architecture, "half"][0]
        return Counts(4096, 128, 768, 2, 2, tile, launch.GATE_BACKWARD, self.multiprocessors)

    def floor_seconds(self, step: str) -> float:
        """One step's product at the data sheet's rate, or its bytes from the cache."""
        counts = self.counts()
        flops = 2 * counts.T * counts.D**2 if step in PRODUCTS else 0
        return max(flops / self.sheet.bfloat16, sum(counts.bytes(step)) / self.cache_bytes_per_second)


@dataclass(frozen=True)
class Counts:
    """Sizes of a call, "sequence" norm, every example S long, and how it is cut."""

    T: int  # tokens
    S: int  # of an example
    D: int
    s: int  # bytes of an element of a state
    w: int  # of a product's operand
    tile: launch.GemmLaunch
    gate: launch.TileLaunch
    programs: int  # that run at once
    g: int = 1  # whether the gates' values are kept

    def names(self) -> dict[str, int]:
        """What the formulas call by one letter."""
        E, M, N = self.T // self.S, math.ceil(self.T / self.tile.block_m), math.ceil(self.D / self.tile.block_n)
        P, C = math.ceil(self.S / self.gate.rows), math.ceil(self.D / self.gate.columns)
        return {
            "T": self.T, "S": self.S, "D": self.D, "s": self.s, "w": self.w, "g": self.g, "E": E,
            "M": M,  # row tiles
            "N": N,  # column tiles
            "Y": N * self.tile.splits,  # strips of columns that have sums of their own
            "X": max(1, self.tile.block_m // self.S),  # examples in a row tile
            "Q": max(1, self.S // self.tile.block_m),  # row tiles in an example
            "P": P,  # positions, by rows of the gate's tile
            "C": C,  # columns, by columns of the gate's tile
            "G": max(1, min(E, self.programs // (P * C))),  # groups of examples
        }  # fmt: skip

    def bytes(self, step: str) -> tuple[int, int]:
        """Loads and stores of one step."""
        loads, stores = (eval(formula, {}, self.names()) for formula in FORMULAS[step])
        return loads, stores


FORMS = {
    # forward steps a gate, backward steps a gate, launches a gate, launches for all else, waits a gate
    "triton": (("forward, product", "forward, norm"), ("backward, product", "backward, gate"), 4, 4, 0),
    "cublas, then persistent": (
        ("forward, behind cuBLAS",), ("backward, product", "backward, gate"), 2, 4, 3,
    ),
    # Its weights are cast behind a wait of its own, which costs about a launch.
    "persistent": (("forward, both in one",), ("backward, product", "backward, gate"), 0, 5, 4),
}  # fmt: skip


MACHINES = {
    "H200": Machine(SHEETS["h200"], "sm_90", 132, 5.5e12),
    "A100": Machine(SHEETS["a100"], "sm_80", 108, 3.5e12),
}


def predict(form: str, machine: Machine, layers: int = 12) -> dict[str, float]:
    """Seconds of the chain's forward and backward with the hidden loss of half as many student layers."""
    counts = machine.counts()
    forward, backward, launches, others, waits = FORMS[form]
    gates, students = layers - 1, layers // 2
    total = gates * sum(sum(counts.bytes(step)) for step in (*forward, *backward))
    total += students * sum(sum(counts.bytes(step)) for step in STUDENT_STEPS)
    total += gates * sum(sum(counts.bytes(step)) for step in ("forward, weights cast", "backward, sums"))
    products = gate_flops(counts.T, counts.D, layers) / machine.sheet.bfloat16
    waiting = LAUNCH_SECONDS * (launches * gates + others) + BARRIER_SECONDS * waits * gates
    return {"bytes": total, "products": products, "cache": total / machine.cache_bytes_per_second, "waiting": waiting}


def markers(name: str) -> tuple[str, str]:
    """Around a table in docs/kernels.md."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def formulas_table() -> str:
    header = ["step", "loads", "stores", *(f"{name}, at least" for name in MACHINES)]
    rows = [
        [step, f"`{loads}`", f"`{stores}`", *(f"{1e6 * m.floor_seconds(step):.1f} us" for m in MACHINES.values())]
        for step, (loads, stores) in FORMULAS.items()
    ]
    return markdown(header, rows)


def predictions_table() -> str:
    header = ["GPU", "form", "MB through the cache", "products", "bytes", "launches and waits", "at least"]
    rows = []
    for name, machine in MACHINES.items():
        for form in FORMS:
            found = predict(form, machine)
            # A product and what it reads overlap; launches and waits do not.
            least = max(found["products"], found["cache"]) + found["waiting"]
            times = (found["products"], found["cache"], found["waiting"], least)
            rows.append([name, form, f"{found['bytes'] / 1e6:.0f}", *(f"{1e3 * time:.2f} ms" for time in times)])
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between their markers there")
    options = parser.parse_args()
    for name, table in (("traffic", formulas_table()), ("forms", predictions_table())):
        print(f"{table}\n")
        if options.write:
            replace_between(options.write, markers(name), table)


if __name__ == "__main__":
    main()
