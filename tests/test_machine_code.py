"""What the compiler made of the two loops on which every figure stands: a product's tile, and the peak it is held to.

gcc 12 has kept the tile's sums in memory where it was written a little differently, at two thirds of the speed, and
drops chains of multiply-adds on which nothing depends. The numbers are right either way: no other test would notice.
"""

import re
import shutil
import subprocess

import pytest

from pyllmc._ops import isa

# floats in a register, rows and vectors of the tile
TILES = {"avx2": (8, 6, 2), "avx512": (16, 12, 2)}
CHAINS = 12

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")


@pytest.fixture(params=sorted(TILES))
def functions(request):
    """ISA, {function: its instructions} of a module."""
    if request.param not in isa.AVAILABLE:
        pytest.skip(f"{request.param} is not built, or does not run here")
    path = isa.load(request.param).__file__
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for block in re.split(r"\n\n+", text):
        header = re.match(r"\s*[0-9a-f]+ <(\S+)>:", block)
        if header:
            found[header[1]] = re.findall(r"^[ \t]*([0-9a-f]+):[ \t]+(\S+)[ \t]*(.*)$", block, re.MULTILINE)
    return request.param, found


def innermost_loops(instructions):
    """The bodies of the loops without loops in them: from the target of a jump backwards to the jump."""
    place = {address: i for i, (address, _, _) in enumerate(instructions)}
    loops = []
    for i, (_, name, operands) in enumerate(instructions):
        target = place.get(operands.split()[0]) if name.startswith("j") and operands else None
        if target is not None and target <= i:
            loops.append((target, i))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    return [instructions[a : b + 1] for a, b in inner]


def multiply_adds(loop):
    return [operands for _, name, operands in loop if name.startswith("vfmadd")]


def test_all_sums_of_a_tile_stay_in_registers(functions):
    name, code = functions
    _, rows, vectors = TILES[name]
    tiles = [body for function, body in code.items() if "tile_product" in function]
    assert tiles, f"{name}: tile_product is not a function of its own"
    for body in tiles:
        loops = {len(multiply_adds(loop)): loop for loop in innermost_loops(body) if multiply_adds(loop)}
        assert sorted(loops) == [rows * vectors // 3, 2 * rows * vectors // 3, rows * vectors]
        for count, loop in loops.items():
            stack = [f"{i} {operands}" for _, i, operands in loop if "rsp" in operands or "rbp" in operands]
            assert not stack, f"{name}: the loop of {count} multiply-adds works on the stack"


def test_the_peak_is_measured_with_independent_chains(functions):
    name, code = functions
    bodies = [body for function, body in code.items() if "fma_chains" in function]
    loops = [loop for body in bodies for loop in innermost_loops(body) if multiply_adds(loop)]
    assert len(loops) == 1
    operands = multiply_adds(loops[0])
    assert len(operands) % CHAINS == 0 and "(" not in "".join(operands)
    assert len({each.rsplit(",", 1)[1] for each in operands}) == CHAINS
