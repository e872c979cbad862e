"""What an installation holds: names, versions, and no top-level ``kernels`` that hides Hugging Face's."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lad_fast

ROOT = Path(__file__).parents[1]

PUBLIC_NAMES = {
    "AttentionObjective",
    "GateStack",
    "LADObjective",
    "LADOutput",
    "LayerMapObjective",
    "fused_aggregate",
    "fused_distill_loss",
    "fused_hidden_loss",
    "reference",
}


def run_python(python: Path | str, code: str, cwd: Path, **environment: str) -> str:
    """Runs code in a fresh process and returns what it printed."""
    done = subprocess.run(
        [python, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module", params=["editable", "wheel", "sdist"])
def installation(request, tmp_path_factory) -> tuple[Path, Path]:
    """A virtual environment holding this library, and the copy of the sources it was installed from."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("lad_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))

    if request.param == "sdist":
        subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=source, check=True, timeout=120)
        (package,) = (source / "dist").iterdir()
    else:
        package = source
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    site = Path(run_python(python, "import sysconfig; print(sysconfig.get_path('purelib'))", folder))
    # Torch and the rest come from the running environment. A .pth file inside a folder named by a .pth file is not
    # read, so an editable install of this library in the running environment stays out.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
            *("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"),
            *(["--editable"] if request.param == "editable" else []),
            package,
        ],
        cwd=folder,
        check=True,
        timeout=120,
    )
    return python, source


def test_install_has_lad_fast_kernels_and_no_kernels(installation, tmp_path):
    python, source = installation
    code = (
        "import importlib.util, lad_fast, lad_fast.kernels;"
        "print(lad_fast.__version__, lad_fast.kernels.__file__, importlib.util.find_spec('kernels'), sep='|')"
    )
    version, file, kernels = run_python(python, code, tmp_path).split("|")
    assert version == lad_fast.__version__
    assert Path(file).is_relative_to(source) == (source.parent.name.startswith("editable"))
    assert kernels == "None"


def test_import_kernels_fails(installation, tmp_path):
    python, _ = installation
    code = "try:\n    import kernels\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert run_python(python, code, tmp_path) == "kernels"


def test_metadata(installation):
    python, _ = installation
    site = next(python.parents[1].glob("lib/python*/site-packages"))
    (distribution,) = (d for d in distributions(path=[str(site)]) if d.metadata["Name"] == "lad_fast")
    assert distribution.version == lad_fast.__version__
    assert distribution.metadata["Requires-Python"] == ">=3.11"
    extras = {"glue", "report", "tensorboard", "trainer", "onnx", "bench", "test", "dev"}
    assert extras == set(distribution.metadata.get_all("Provides-Extra"))
    assert [point.value for point in distribution.entry_points] == ["lad_fast.cli:main"]

    requirements = [Requirement(line) for line in distribution.requires]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for requirement in requirements:
        if requirement.name != "triton":
            assert pins[requirement.name] in requirement.specifier, requirement
    (triton,) = (r for r in requirements if r.name == "triton")
    assert "3.6.0" in triton.specifier and "3.9.0" in triton.specifier and "3.10.0" not in triton.specifier
    assert str(triton.marker) == 'platform_system == "Linux"'


def test_installed_files(installation):
    python, source = installation
    code = "import lad_fast; from pathlib import Path; print(Path(lad_fast.__file__).parent)"
    package = Path(run_python(python, code, source.parent))
    assert (package / "py.typed").is_file()


def test_an_index_would_take_it(installation):
    """Metadata and README of what was built, by the tool that uploads."""
    _, source = installation
    shutil.copytree(ROOT / "tests", source / "tests", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for command in ("sdist", "bdist_wheel"):
        subprocess.run([sys.executable, "setup.py", "-q", command], cwd=source, check=True, timeout=120)
    built = sorted(map(str, (source / "dist").iterdir()))
    assert len(built) == 2
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (sources,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(sources) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "lad_fast/cli.py", "kernels/chain.py"} <= names
    assert not any(name.startswith("tests") for name in names)  # a part of them, without what they read


def test_pytest_leaves_the_repository_root_off_the_path():
    assert not (ROOT / "conftest.py").exists()
    assert str(ROOT) not in sys.path
    assert importlib.util.find_spec("kernels") is None


def test_public_names():
    assert set(lad_fast.__all__) == PUBLIC_NAMES
    assert all(hasattr(lad_fast, name) for name in PUBLIC_NAMES)


def test_import_and_use_without_triton(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, lad_fast, lad_fast.cli\n"
        "z = torch.tensor([[1.0, -1.0]], requires_grad=True)\n"
        "lad_fast.fused_distill_loss(z, z.detach(), torch.tensor([0])).backward()\n"
        "print(bool(z.grad.abs().sum() > 0))"
    )
    assert run_python(sys.executable, code, tmp_path, TRITON_INTERPRET="0") == "True"
