"""README's figures are those of the result files, and its example runs."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def real_data():
    spec = importlib.util.spec_from_file_location("real_data", ROOT / "benchmarks/real_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_real_data_table_is_the_result_files():
    module = real_data()
    assert module.between_markers(README) == module.table(json.loads(module.RESULT.read_text())).strip()


def test_the_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    names = {}
    # The default back end under the interpreter would be Triton's, at minutes for these sizes.
    code = code.replace("hidden_weight=1000.0)", 'hidden_weight=1000.0, backend="torch")')
    code = code.replace("9, 11))", '9, 11), backend="torch")')
    exec(code, names)
    assert all(p.grad.any() for p in names["gates"].parameters())
    assert len(names["aggregates"]) == 6
