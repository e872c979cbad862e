"""Every Triton kernel compiles for GPUs that are not here, to what its source means it to; what the figures mean."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import aot

import lad_fast.kernels


def kernel_names() -> set[str]:
    """Of every kernel in the library."""
    found = pkgutil.iter_modules(lad_fast.kernels.__path__)
    modules = [importlib.import_module(f"lad_fast.kernels.{module.name}") for module in found]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def run_compiling(*command) -> subprocess.CompletedProcess:
    """A script in a process of its own: here Triton interprets, and an interpreted kernel cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_kernels_compile_to_fast_code(architecture, tmp_path):
    file = tmp_path / "rows.json"
    print(run_compiling(aot.__file__, "--architecture", architecture, "--json", file).stdout)
    rows = json.loads(file.read_text())
    assert {row["kernel"] for row in rows} == kernel_names() >= set(aot.GEMM_KERNELS)

    def where(condition, rows) -> list[tuple]:
        return sorted({(row["kernel"], row["precision"], row["mode"]) for row in rows if condition(row)})

    # float32 in full precision ("ieee") has no matrix instruction on NVIDIA's GPUs; everything else must use them.
    products = [row for row in rows if row["products"] and row["precision"] != "ieee"]
    half = [row for row in products if row["precision"] == "bfloat16"]
    assert {row["kernel"] for row in half} == set(aot.GEMM_KERNELS)
    limit = aot.ARCHITECTURES[architecture].shared_limit
    faults = {
        "spills": where(lambda row: row["spilled_bytes"], rows),
        "programs that wait for some that do not fit": where(lambda r: r["resident_blocks"] < r["asked_blocks"], rows),
        "too much shared memory": where(lambda row: row["shared_bytes"] > limit, rows),
        "no matrix instruction": where(lambda row: row["matrix_loops"] < row["products"], products),
        # What a thread does not read itself, but has the tensor memory accelerator fetch, has no width.
        "narrow reads in a product": where(lambda row: (row["narrowest_in_loop"] or 16) < 16, half),
    }
    assert {fault: found for fault, found in faults.items() if found} == {}
    documented = (Path(__file__).parents[2] / "docs/kernels.md").read_text(encoding="utf-8").splitlines()
    table = aot.markdown_table([aot.Row(**row) for row in rows]).splitlines()
    assert [line for line in table if line not in documented] == []  # aot.py --markdown --write docs/kernels.md


@pytest.mark.slow
def test_twelve_layers_hardly_spill(tmp_path):
    """As a BERT-base under a teacher cache: pointers to more layers and students than the other cases have."""
    file = tmp_path / "rows.json"
    precisions = ("--precision", "bfloat16", "autocast")
    run_compiling(aot.__file__, "--architecture", "sm_90", *precisions, "--deep", "--json", file)
    spilled = {(row["kernel"], row["precision"]): row["spilled_bytes"] for row in json.loads(file.read_text())}
    assert {(kernel, precision) for kernel in aot.GEMM_KERNELS for precision in precisions[1:]} <= spilled.keys()
    assert max(spilled.values()) <= 256  # a quarter of the registers: in an epilogue, once a tile and gate


@pytest.fixture(scope="module")
def picked() -> dict[str, dict]:
    """By architecture."""
    done = run_compiling(Path(__file__).with_name("picking.py"))
    assert "Warning" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_a_launch_compiles_as_it_would_run(architecture, picked):
    """Tuples of pointers, one picked at run time and still read 16 bytes at once; sizes; the launch's options."""
    found = picked[architecture]
    types = [part.split(": ")[1].split()[0] for part in found["parameters"].split("%")[1:]]
    assert types[:3] == types[3:4] * 3 and "tt.ptr<bf16>" in types[0]
    assert [name.rstrip(",)") for name in types[4:]] == ["i32", "i64", "i32", "i32"]  # ONE is an argument, no constant
    assert found["parameters"].count("tt.divisibility = 16") == 5  # the pointers and LARGE
    assert found["launch_cooperative_grid"] and found["enable_fp_fusion"] and found["num_warps"] == 2
    figures = found["figures"]
    assert set(figures["loads"]) == set(figures["stores"]) == {"16"}
    assert not figures["products"] and not figures["spilled_bytes"] and figures["registers"] > 0


PTX = """
// %bb.0:
	@%p1 ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ];
	ld.acquire.gpu.global.b32 	%r1, [%rd4];
	ld.param.b64 	%rd5, [k_param_0];
$L__BB0_1:                              // =>This Loop Header: Depth=1
                                        //     Child Loop BB0_3 Depth 2
	cp.async.ca.shared.global [ %r2 + 0 ], [ %rd6 + 0 ], 0x4, %r3;
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r4}, %rd7, %rd8;
$L__BB0_2:                              //   in Loop: Header=BB0_3 Depth=2
	@%p2 cp.async.cg.shared.global [ %r2 + 0 ], [ %rd6 + 0 ], 0x10, %r3;
	cp.async.commit_group;
$L__BB0_3:                              // %.lr.ph
                                        //   Parent Loop BB0_1 Depth=1
                                        // =>  This Inner Loop Header: Depth=2
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r4}, %rd7, %rd8;
	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
	ld.global.v4.b16 {%rs1, %rs2, %rs3, %rs4}, [ %rd9 + 0 ];
// %bb.4:
	@!%p3 st.global.b16 [ %rd10 + 0 ], { %rs1 };
	st.shared.v4.b32 [ %r5 + 0 ], {%r6, %r7, %r8, %r9};
"""
AMDGCN = """
; %bb.0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	global_load_ushort v1, v[2:3], off
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[4:7], v4, s[8:11], 0 offen offset:64
	buffer_load_dword v5, s[8:11], 0 offen lds
	global_load_lds_dword v[0:1], off
	v_mfma_f32_32x32x8_bf16 v[16:31], v[50:51], v[42:43], 0
; %bb.2:
	global_store_short_d16_hi v[0:1], v2, off
	buffer_store_dwordx2 v[2:3], v6, s[8:11], 0 offen
"""


def test_assembly_tells_widths_and_the_loop_of_the_product():
    ptx = aot.read_assembly(PTX, aot.ARCHITECTURES["sm_90"].matrix_instruction)
    assert ptx == {
        "matrix_instructions": 2, "async_copies": 3, "loads": {16: 1, 4: 1, 8: 1}, "stores": {2: 1},
        "matrix_loops": 1, "narrowest_in_loop": 8,
    }  # fmt: skip
    amdgcn = aot.read_assembly(AMDGCN, aot.ARCHITECTURES["gfx942"].matrix_instruction)
    assert amdgcn == {
        "matrix_instructions": 1, "async_copies": 2, "loads": {2: 1, 16: 1}, "stores": {2: 1, 8: 1},
        "matrix_loops": 1, "narrowest_in_loop": 4,
    }  # fmt: skip
    assert aot.read_assembly("", "wgmma")["narrowest_in_loop"] is None


# Registers, shared memory, tensor memory, warps and blocks limit in turn. NVIDIA's are its occupancy calculator's.
@pytest.mark.parametrize(
    ("architecture", "num_warps", "registers", "shared", "columns", "blocks"),
    (
        ("sm_90", 8, 230, 0, 0, 1),
        ("sm_90", 8, 128, 0, 0, 2),
        ("sm_90", 4, 168, 0, 0, 3),
        ("sm_80", 4, 32, 40 * 1024, 0, 4),
        ("sm_90", 4, 32, 227 * 1024, 0, 1),
        ("sm_90", 4, 32, 0, 0, 16),
        ("sm_90", 1, 32, 0, 0, 32),
        ("sm_100", 4, 32, 16, 256, 2),
        ("gfx942", 4, 512, 0, 0, 1),
        ("gfx942", 8, 129, 0, 0, 1),
        ("gfx942", 8, 128, 0, 0, 2),
        ("gfx942", 4, 32, 16 * 1024, 0, 4),
        ("gfx942", 2, 16, 0, 0, 16),
    ),
)
def test_resident_blocks(architecture, num_warps, registers, shared, columns, blocks):
    assert aot.resident_blocks(architecture, num_warps, registers, shared, columns) == blocks


def test_the_short_table_has_the_worst_mode_and_goes_between_its_markers(tmp_path):
    def row(precision, mode, registers, narrowest):
        products = int(narrowest is not None)
        figures = aot.Figures(4, registers, 0, 1500, 64 // registers, products, 4, 2, {16: 1}, {4: 1}, 1, narrowest)
        names = {"kernel": "_gate_kernel", "architecture": "sm_90", "precision": precision, "mode": mode}
        return aot.Row(**vars(figures), **names, asked_blocks=1)

    rows = [
        row("bfloat16", "plain", 32, 16), row("bfloat16", "packed", 16, 8), row("tf32", "plain", 32, 8),
        row("bfloat16", "plain", 16, None), row("ieee", "plain", 16, None),
    ]  # fmt: skip
    table = aot.markdown_table(rows)
    assert table.splitlines()[2:] == [
        "| `_gate_kernel` | sm_90 | bfloat16, tf32 | 1 | 32 | 2 | 2 | 4 | 2 | 8 |",
        "| `_gate_kernel` | sm_90 | bfloat16, ieee | 0 | 16 | 2 | 4 | 4 | 2 | - |",
    ]
    file = tmp_path / "kernels.md"
    file.write_text("Before\n{}\nold\n{}\nafter\n".format(*aot.MARKERS))
    for _ in range(2):
        aot.replace_between(file, aot.MARKERS, table)
        assert file.read_text() == f"Before\n{aot.MARKERS[0]}\n{table}\n{aot.MARKERS[1]}\nafter\n"
