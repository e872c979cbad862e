"""Compile one small launch for each architecture and print what came of it: see test_aot.py.

A process of its own, since Triton's interpreter leaves its language patched in one where it ran.
"""

import json
from dataclasses import asdict

import aot
import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["COUNT", "ONE"])
def picking(states, out_ptr, i, LARGE, COUNT, ONE, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    pointer = states[0]
    for j in tl.static_range(1, len(states)):
        if i == j:
            pointer = states[j]
    tl.store(out_ptr + o, tl.load(pointer + o) * (LARGE + COUNT + ONE))


if __name__ == "__main__":
    state = torch.zeros(2048, dtype=torch.bfloat16)
    arguments = {"states": (state,) * 3, "out_ptr": state, "i": 2, "LARGE": 2**31, "COUNT": 16, "ONE": 1}
    arguments |= {"BLOCK": 2048, "num_warps": 2, "launch_cooperative_grid": True}
    names = ("launch_cooperative_grid", "enable_fp_fusion", "num_warps")
    found = {}
    for architecture in aot.ARCHITECTURES:
        compiled = aot.compile_launch(picking, arguments, architecture)
        (parameters,) = [line for line in compiled.asm["ttir"].splitlines() if "tt.func public" in line]
        metadata = {name: getattr(compiled.metadata, name) for name in names}
        figures = asdict(aot.inspect(compiled, architecture))
        found[architecture] = {"parameters": parameters, **metadata, "figures": figures}
    print(json.dumps(found))
