"""What the documents say of the code is so: messages, links, commands, rendered docstrings."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lad_fast.cli import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def messages() -> list[str]:
    """Every string of the code; … stands for what an f-string puts in."""
    found = []
    for path in (*ROOT.glob("lad_fast/*.py"), *ROOT.glob("kernels/*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
    return found


def test_messages_of_troubleshooting_are_in_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    told = [phrase for bold in re.findall(r"\*\*(.+?)\*\*", page, re.S) for phrase in re.findall("`(.+?)`", bold, re.S)]
    told = [phrase for phrase in told if not phrase.startswith("pip ")]
    known = messages()
    assert len(told) > 15
    for phrase in told:
        pattern = re.compile(".+".join(map(re.escape, " ".join(phrase.split()).split("…"))), re.S)
        assert any(pattern.search(text) for text in known), phrase


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
        assert "://" in link or (page.parent / link).exists(), link


def commands(page: Path) -> list[list[str]]:
    """Arguments of every ``lad-fast`` in a block of commands."""
    fenced = re.findall(r"```(\w*)\n(.*?)```", page.read_text("utf-8"), re.S)
    blocks = [block for language, block in fenced if language in ("", "bash", "sh")]
    lines = [line.split("#")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line) for line in lines if re.match(r"(\.venv/bin/)?(lad-fast|torchrun) ", line)]
    return [line[line.index("lad_fast") + 1 :] if line[0] == "torchrun" else line[1:] for line in words]


def test_commands_parse():
    lines = [line for page in PAGES for line in commands(page)]
    assert len(lines) > 12
    for line in lines:
        assert parse(line) is not None, line


def test_docstrings_render(tmp_path):
    """By the command of ``make docs``, without a warning."""
    line = re.search(r"^\t\$\(BIN\)/(pdoc .*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    words = line.replace("--output-directory site", f"--output-directory {tmp_path}").split()
    done = subprocess.run([sys.executable, "-P", "-m", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    names = {
        "lad_fast.html": ("fused_aggregate", "GateStack.contributions", "LADObjective", "LADOutput.hidden_losses"),
        "lad_fast/objective.html": ("HiddenObjective.forward",),
        "lad_fast/training.html": ("DistillConfig.teacher_cache", "distill"),
    }
    for file, expected in names.items():
        page = (tmp_path / file).read_text("utf-8")
        for name in expected:
            assert f'id="{name}"' in page, name
    for module in words[words.index(str(tmp_path)) + 1 :]:
        assert (tmp_path / f"{module.replace('.', '/')}.html").is_file(), module
