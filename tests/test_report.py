"""Reports of runs, and the table and figure of a comparison."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lad_fast import report as report_module
from lad_fast.cli import main
from lad_fast.data import tokenize
from lad_fast.demo import TASK, build_teacher, build_tokenizer, make_splits
from lad_fast.report import Measurement, comparison_figure, comparison_table, format_table, report
from lad_fast.training import DistillConfig, FinetuneConfig, distill, finetune

TEACHER = Measurement("teacher", 0.987, 1_234_567, 61.25, 4321.0)
STUDENT = Measurement("student, LAD", 0.9, 600_000, 9.5, 8000.0)


def test_table_is_aligned():
    assert format_table(["name", "n"], [["a", "1"], ["longer", "10"]]).splitlines() == [
        "name     n",
        "----------",
        "a        1",
        "longer  10",
    ]


def test_table_names_a_row_that_does_not_fit():
    with pytest.raises(ValueError, match=r"rows: each takes 2 cells, one has 1: \['a'\]"):
        format_table(["name", "n"], [["a"]])


def test_comparison_table():
    header, _, teacher, student = comparison_table([TEACHER, STUDENT]).splitlines()
    assert header.split() == ["model", "accuracy", "parameters", "training", "sentences/s"]
    assert teacher.split() == ["teacher", "98.7%", "1,234,567", "61.2", "s", "4,321"]
    assert student.split() == ["student,", "LAD", "90.0%", "600,000", "9.5", "s", "8,000"]


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figure_is_written(suffix, start, tmp_path):
    path = comparison_figure([TEACHER, STUDENT], tmp_path / f"figure.{suffix}")
    assert path.read_bytes().startswith(start)


def test_figure_names_its_models(tmp_path):
    svg = comparison_figure([TEACHER, STUDENT], tmp_path / "figure.svg", metric="F1").read_text()
    for text in ("teacher", "student, LAD", "F1 (%)", "parameters (millions)", "training (seconds)"):
        assert text in svg


def test_figure_takes_at_least_one_measurement(tmp_path):
    with pytest.raises(ValueError, match="measurements: takes at least one"):
        comparison_figure([], tmp_path / "figure.png")


def test_figure_without_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lad_fast\[report\]"):
        comparison_figure([TEACHER], tmp_path / "figure.png")


# --- reports ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of finished runs: a teacher, and students by LAD and by logits; three evaluations each."""
    root = tmp_path_factory.mktemp("runs")
    examples = make_splits(seed=1, num_train=96, num_dev=60)
    tokenizer = build_tokenizer(examples["train"].texts)
    splits = {name: tokenize(split, tokenizer, 32) for name, split in examples.items()}
    data = {"task": TASK, "train": splits["train"], "evaluation": {"validation": splits["validation"]}}
    common = {
        "task": "demo", "batch_size": 16, "epochs": 3, "max_length": 32, "log_every": 2, "progress": False,
        "device": "cpu", "precision": "float32",
    }  # fmt: skip
    teacher = build_teacher(tokenizer, seed=1)
    finetune(FinetuneConfig(model="made here", output_dir=root / "teacher", **common), **data, model=teacher)
    for method in ("lad", "logits"):
        config = DistillConfig(
            teacher="made here", output_dir=root / method, method=method, student_layers=3, backend="torch",
            learning_rate=3e-4, gate_learning_rate=1e-3, **common,
        )  # fmt: skip
        distill(config, **data, teacher=teacher)
    return root


@pytest.fixture
def run(runs, tmp_path):
    """A copy of LAD's run, to be spoilt."""
    pages = shutil.ignore_patterns("*.html", "*.png")
    return shutil.copytree(runs / "lad", tmp_path / "lad", ignore=pages)


def lines(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def write_lines(run, records):
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def titles(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def facts(page):
    return dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page))


COMMON = ["Loss", "Metrics", "Learning rate", "Throughput, tokens a second", "Peak memory so far, MB", "Confusion"]
OF_LAD = ["Hidden loss by student layer", "Gate openness", "What the student&#x27;s layers learn from"]


def test_a_report_shows_all_that_a_run_logged(runs, capsys):
    folder = runs / "lad"
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert sorted(titles(page)) == sorted([*COMMON, *OF_LAD, "Settings and versions"])
    assert page.count("<svg") == len(COMMON + OF_LAD)
    told, results = facts(page), json.loads((folder / "results.json").read_text())
    assert told["validation accuracy"] == f"{results['best_metrics']['validation']['accuracy']:.4f}"
    assert told["best at step"] == f"{results['best_step']} of 18"
    assert told["parameters"] == f"{results['num_parameters'] / 1e6:.1f} M"
    assert (told["method"], told["hidden_weight"], told["lad_fast"]) == ("lad", "1000.0", "0.1.0")
    best = next(line for line in lines(folder) if "metrics" in line and line["step"] == results["best_step"])
    for text in (">unkind<", ">kind<", *(f">{n}<" for row in best["confusion"]["validation"] for n in row)):
        assert text in page, "of the confusion matrix"
    for line in [line for line in lines(folder) if "contributions" in line]:
        for text in (f">epoch {line['epoch']}<", *(f">{100 * n:.0f}<" for n in line["contributions"][2])):
            assert text in page, "of the heat maps"


def test_a_report_needs_nothing_else(runs, tmp_path):
    page = report([runs / "lad"], tmp_path / "new" / "page.html").read_text()
    assert (tmp_path / "new" / "page.png").is_file()
    links = re.findall(r"""(?:href|src)\s*=\s*["']([^"']+)|url\(([^)]+)\)|@import""", page)
    assert len(links) > 20, "markers, clips, heat maps"
    assert all((one or other).startswith(("data:", "#")) for one, other in links)
    assert "<script" not in page and "default-src 'none'" in page


@pytest.mark.parametrize("name", ["teacher", "logits"])
def test_a_run_without_gates_leaves_them_out(runs, name, tmp_path):
    assert titles(report([runs / name], tmp_path / "page.html").read_text()) == [*COMMON, "Settings and versions"]


def test_a_run_in_progress_is_shown_so_far(run):
    """Killed in the middle of a line."""
    (run / "results.json").unlink()
    content = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(content[:-40])
    page = report([run]).read_text()
    *_, latest = [line for line in lines_but_the_last(content) if "metrics" in line]
    assert "not finished" in page
    records = [json.loads(line) for line in (run / "log.jsonl").read_bytes().splitlines()[:-1]]
    step = max(record["step"] for record in records)
    (run / f"not-finite-step-{step + 1}").mkdir()
    (run / "not-finite-step-1").mkdir()
    assert f"ended at step {step + 1} by numbers that are not finite" in report([run]).read_text()
    (run / f"not-finite-step-{step + 1}").rmdir()  # and of one that got over the first step, by other settings:
    assert "not finished" in report([run]).read_text()
    assert facts(page)["steps so far"] == "18"
    assert facts(page)["validation accuracy"] == f"{latest['metrics']['validation']['accuracy']:.4f}"
    assert "epoch 3" not in page


def lines_but_the_last(content):
    return [json.loads(line) for line in content.splitlines()[:-1]]


def test_a_run_that_has_just_begun(run):
    (run / "results.json").unlink()
    (run / "log.jsonl").write_text("")
    page = report([run]).read_text()
    assert titles(page) == ["Settings and versions"]
    assert facts(page)["steps so far"] == "0"


def test_a_single_log_line_is_seen_in_every_panel(run):
    first = next(record for record in lines(run) if "loss" in record)
    write_lines(run, [first])
    page = report([run]).read_text()
    figures = re.findall(r"<h2>([^<]*)</h2>\s*(<svg.*?</svg>)", page, re.S)
    drawn = {title: svg for title, svg in figures}
    assert {"Loss", "Learning rate", "Peak memory so far, MB"} <= drawn.keys()
    for title, svg in drawn.items():
        assert re.search(r"<use [^>]*style=\"fill: #(2563eb|[0-9a-f]{6}); stroke: #(?!64748b)", svg), title


@pytest.mark.parametrize(("number", "length"), [(2, 8), (3, 60), (8, 25), (9, 2), (24, 2), (77, 30)])
def test_names_of_classes_do_not_lie_over_each_other(run, number, length):
    """As long as they may be, and as many: by number then, and told below."""
    names = [f"a class with a {'very ' * 12}"[: length - 2] + f"{i:02}" for i in range(number)]
    config = json.loads((run / "best/config.json").read_text())
    config["id2label"] = dict(enumerate(names))
    (run / "best/config.json").write_text(json.dumps(config))
    records = [record | {"confusion": {"validation": np.eye(number, dtype=int).tolist()}} for record in lines(run)
               if "metrics" in record]  # fmt: skip
    write_lines(run, records)
    found = report_module._read_run(run, "run")
    panel = report_module._confusion(found)
    with report_module._style():
        figure = report_module._new_figure(5.4, 2.9)
        panel.draw(figure)
        FigureCanvasAgg(figure).draw()
        (axes,) = figure.axes
        texts = [[label for label in axis.get_ticklabels() if label.get_text()] for axis in (axes.xaxis, axes.yaxis)]
    for labels in texts:
        shown = [label.get_text() for label in labels]
        assert len(set(shown)) == len(shown)
        assert len(shown) == number if number <= 9 else len(shown) > 8
    assert all((name in panel.note) == (number > 8 and names[0] != "0") for name in names)
    boxes = [label.get_window_extent() for label in texts[1]]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    # Slanted texts' boxes overlap where they do not: what lies between their lines counts.
    turned = texts[0][0].get_rotation()
    places = sorted(axes.transData.transform((tick, 0))[0] for tick in axes.get_xticks())
    heights = max(box.height for box in boxes)
    gap = min(b - a for a, b in itertools.pairwise(places))
    width = max(label.get_window_extent().width for label in texts[0])
    assert gap * math.sin(math.radians(turned)) > 0.9 * heights if turned else gap > width


def test_letters_that_the_font_lacks_warn_of_nothing(run, recwarn):
    config = json.loads((run / "best/config.json").read_text())
    config["id2label"]["0"] = "\u597d\u7684"
    (run / "best/config.json").write_text(json.dumps(config))
    assert "\u597d\u7684" in report([run]).read_text()
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_all_teacher_layers_are_named_by_their_numbers(run):
    records = [record for record in lines(run) if "contributions" in record]
    shares = [[1 / 24] * 24] * 12
    write_lines(run, [record | {"contributions": shares} for record in records])
    svg = re.search(r"learn from</h2>\s*(<svg.*?</svg>)", report([run]).read_text(), re.S).group(1)
    shown = re.findall(r">(\d+)</text>", svg)
    assert [shown.count(str(i)) for i in range(26)] == [0] + [6] * 12 + [3] * 12 + [0]  # three epochs, two axes


def test_several_runs_are_compared(runs, tmp_path, capsys):
    assert main(["report", *(str(runs / name) for name in ("lad", "logits", "teacher"))]) == 0
    path = runs / "lad" / "comparison.html"
    assert capsys.readouterr().out == f"{path}\n"
    page = path.read_text()
    tables = [
        [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", table)]
        for table in re.findall("<table>(.*?)</table>", page, re.S)
    ]
    (header, *rows), settings = tables
    assert header[:3] == ["run", "validation accuracy", "best at step"]
    assert [row[0] for row in rows] == ["lad", "logits", "teacher"]
    assert rows[0][2].endswith(" of 18")
    differing = {row[0]: row[1:] for row in settings}
    assert differing["method"] == ["lad", "logits", ""]
    assert differing["learning_rate"] == ["0.0003", "0.0003", "3e-05"]
    assert "epochs" not in differing and "model" not in differing
    assert {"Accuracy, validation", "Loss", "Hidden loss", "Throughput, tokens a second"} < set(titles(page))
    loss = re.search("<h2>Loss</h2>.*?</figure>", page, re.S)[0]
    assert all(f">{name}<" in loss for name in ("lad", "logits", "teacher"))
    assert path.with_suffix(".png").is_file()


def test_runs_of_one_name_are_told_apart(runs, run, tmp_path):
    page = report([run, runs / "lad"], tmp_path / "page.html").read_text()
    assert f"<td>{run}</td>" in page and f"<td>{runs / 'lad'}</td>" in page


STRANGE = "<script>alert(1)</script>&\"'$\\frac{$ \x00\x1b\ud800\n"
SAFE = "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;$\\frac{$ \N{REPLACEMENT CHARACTER}"


def test_texts_from_files_are_only_texts(run, tmp_path):
    run = run.rename(tmp_path / "_<script>$x$")
    config = json.loads((run / "config.json").read_text())
    changed = {"task": STRANGE, "teacher": STRANGE, STRANGE: STRANGE, "norm": STRANGE, "versions": {STRANGE: STRANGE}}
    (run / "config.json").write_text(json.dumps(config | changed))
    (run / "best/config.json").write_text(json.dumps({"id2label": {"0": STRANGE, "1": "$x^$"}}))
    records = lines(run)
    for record in records:
        if "metrics" in record:
            record["metrics"] = {STRANGE: {STRANGE: 0.5}}
            record["confusion"] = {STRANGE: record["confusion"]["validation"]}
            record["gates"][1]["state"] = STRANGE
    write_lines(run, records)
    other = shutil.copytree(run, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config))
    for folders, least in (([run], 8), ([run, other], 4)):
        page = report(folders, tmp_path / "page.html").read_text()
        assert "<script" not in page
        assert page.count(SAFE) >= least
        drawn = "".join(re.findall("<svg.*?</svg>", page, re.S))
        assert "&lt;script&gt;alert(1)" in drawn, "labels and legends are texts of their own"
    assert re.search(r"<title>_&lt;script&gt;\$x\$", page)


def test_numbers_at_their_limits_are_drawn(run):
    """A loss that overflowed in float16, nothing at all, and what no run writes but a file may hold."""
    records = lines(run)
    numbers = iter([float("inf"), float("nan"), 0.0, -1.0, 1e300, -1e300])
    for record in records:
        if "loss" in record:
            number = next(numbers, 0.0)
            record |= {"loss": number, "tokens_per_second": number, "peak_memory_mb": number, "lr": number}
    write_lines(run, records)
    assert len(titles(report([run]).read_text())) == len(COMMON + OF_LAD) + 1


DAMAGE = {
    "torn": ('{"step": 4, "epoch"', "Expecting"),
    "not utf-8": ("\udcff", "decode"),
    "no object": ("[1, 2]", "it takes an object with step and epoch"),
    "too deep": ("[" * 100_000, "recursion"),
    "no step": ({"epoch": 1, "loss": 1.0}, "it takes an object with step and epoch"),
    "text for a number": ({"loss": "<script>"}, "loss is '<script>'; it takes a number"),
    "no number": ({"step": None}, "step is None; it takes a number"),
    "truth": ({"lr": True}, "lr is True; it takes a number"),
    "huge": ({"lr": 10**400}, "lr is 1000"),
    "a number for numbers": ({"hidden_losses": 1.0}, "hidden_losses is 1.0; it takes numbers"),
    "other layers": ({"hidden_losses": [1.0]}, "hidden_losses is of shape (1,); in lines before it is (3,)"),
    "metrics": ({"metrics": {"validation": 1}}, "metrics takes numbers by split and name"),
    "metric": ({"metrics": {"validation": {"accuracy": "high"}}}, "metrics takes numbers by split and name"),
    "gates": ({"metrics": {}, "gates": [1.0]}, "gates takes a list of objects"),
    "gate": ({"metrics": {}, "gates": [{}]}, "gates is [None]; it takes numbers"),
    "ragged": ({"contributions": [[1.0], [0.5, 0.5]]}, "contributions is [[1.0], [0.5, 0.5]]; it takes rows of"),
    "no rows": ({"contributions": []}, "contributions is []; it takes rows of numbers"),
    "confusion": ({"metrics": {}, "confusion": [[1]]}, "confusion takes a matrix by split"),
    "oblong": ({"metrics": {}, "confusion": {"dev": [[1, 2]]}}, "confusion of dev has 1 rows and 2 columns"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_is_refused_by_line(run, damage):
    line, reason = DAMAGE[damage]
    content = (run / "log.jsonl").read_text().splitlines()
    if isinstance(line, dict):
        line = json.dumps({"step": 3, "epoch": 1} | line if "epoch" not in line else line)
    content[2] = line
    (run / "log.jsonl").write_text("\n".join(content) + "\n", errors="surrogateescape")
    with pytest.raises(ValueError) as error:
        report([run])
    assert str(error.value).startswith(f"{run / 'log.jsonl'}, line 3, is not what a run writes: ")
    assert reason in str(error.value)
    assert len(str(error.value)) < len(str(run)) + 250
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.json", "{", "results.json is no JSON"),
        ("results.json", "[]", "results.json holds a list; it takes an object"),
        ("results.json", '{"best_step": "x"}', "results.json: best_step is 'x'; it takes a number"),
        ("config.json", "null", "config.json holds a NoneType; it takes an object"),
        ("best/config.json", "\0", "config.json is no JSON"),
    ],
)
def test_other_damaged_files_are_refused_by_name(run, file, content, message):
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        report([run])


def test_what_a_report_does_not_take(run, tmp_path):
    with pytest.raises(ValueError, match="runs is empty; it takes at least one"):
        report([])
    with pytest.raises(ValueError, match=f"runs holds {tmp_path}, without log.jsonl"):
        report([run, tmp_path])
    with pytest.raises(ValueError, match=r"output is page.png; it takes a path that ends in .html"):
        report([run], "page.png")


def test_a_report_without_matplotlib_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lad_fast\[report\]"):
        report([run])
    assert not (run / "report.html").exists()


# --- in a browser -----------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def screenshot(page, folder):
    """The page's pixels, (H, W, 3), and what the browser's console says of it."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,2200"]
    own = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'page.png'}", "--enable-logging=stderr"]
    command = [BROWSER, *flags, *own, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    from PIL import Image

    pixels = np.asarray(Image.open(folder / "page.png").convert("RGB"))
    return pixels, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_the_report(run, tmp_path):
    page = report([run])
    pixels, console = screenshot(page, tmp_path)
    assert console == []
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    for color in ("#2563eb", "#d97706", "#059669"):  # the losses'
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (pixels[100:700] == wanted).all(axis=2).sum() > 100
    # Two columns of white cards, whose rows of figures reach down the page, and a margin at either side.
    margins = np.concatenate([pixels[:, :20], pixels[:, -20:]], axis=1)
    assert (margins == np.array([248, 250, 252])).all(), "nothing is wider than the page"
    assert (pixels[1200:2000] < 128).any(axis=2).sum() > 5000, "figures further down"

    page.write_text(page.read_text().replace("</body>", "<script>document.body.remove()</script></body>"))
    same, console = screenshot(page, tmp_path)
    assert len(console) == 1 and "Content Security Policy" in console[0], "and were a script let in, it would not run"
    assert np.array_equal(same, pixels)


def test_facts_are_the_results(run):
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"seconds": 12.0, "tokens": 60_000}))
    told = facts(report([run]).read_text())
    assert (told["training"], told["tokens/s"]) == ("12 s", "5,000")


def test_the_gates_states_are_the_last_ones(run):
    records = lines(run)
    evaluations = [record for record in records if "gates" in record]
    evaluations[0]["gates"][0]["state"], evaluations[-1]["gates"][1]["state"] = "saturated", "collapsed"
    write_lines(run, records)
    assert "At the end gates[1] is collapsed." in report([run]).read_text()
