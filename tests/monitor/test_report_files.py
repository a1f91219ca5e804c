"""What `distnorm report` and `distnorm suggest-threshold` read, work out and refuse; no browser is needed."""

from __future__ import annotations

import base64
import inspect
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distnorm import cli
from distnorm.errors import DistnormError, RunError
from distnorm.monitor.report import command, thresholds
from distnorm.monitor.report.layers import read_layers
from distnorm.monitor.report.numbers import percentile, short
from distnorm.monitor.report.runs import read_runs
from distnorm.monitor.report.steps import read_steps
from tests.monitor.synthetic import metric_row, write_lines, write_run


def data(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="page">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert found is not None
    read = json.loads(found[1])
    assert isinstance(read, dict)
    return read


def figures(page: Path) -> list[dict[str, Any]]:
    return list(data(page)["figures"])


def columns(page: Path, run: int = 0) -> dict[str, list[float]]:
    return {name: unpacked(column) for name, column in data(page)["runs"][run]["columns"].items()}


def unpacked(value: dict[str, str]) -> list[float]:
    kind = {"f8": "d", "f4": "f", "i4": "i"}[value["dtype"]]
    data = base64.b64decode(value["bdata"])
    return list(struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data))


def test_the_norm_chart_holds_the_file_bit_for_bit(folder: Path) -> None:
    norms = [3.0, 0.1, math.nan, 1e-300, 1e300, math.inf, 2.0]
    write_lines(folder / "metrics.jsonl", (metric_row(step, norm) for step, norm in enumerate(norms, 1)))
    page = folder / "page.html"
    assert command.main([folder], page) == 0
    found = columns(page)
    lines = [(line["column"], line["marks"]) for line in figures(page)[0]["lines"]]
    assert lines == [("norm", 0), ("threshold", 0), ("norm", 1), ("", 4)]
    assert found["step"] == list(range(1, 8))
    drawn = found["norm"]
    assert [value for value in drawn if not math.isnan(value)] == [3.0, 0.1, 1e-300, 1e300, 2.0]
    assert [place for place, value in enumerate(drawn) if math.isnan(value)] == [2, 5]
    assert found["threshold"] == [1.0] * 7
    assert [step for step, flags in zip(found["step"], found["flags"], strict=True) if flags & 1] == [1, 5, 7]
    assert [step for step, flags in zip(found["step"], found["flags"], strict=True) if flags & 4] == [3, 6]


def test_long_runs_keep_their_extremes(folder: Path) -> None:
    norms = [1 + (step * 7919 % 1000) / 1000 for step in range(30_000)]
    norms[12_345], norms[23_456] = 50.0, 0.001
    write_lines(folder / "metrics.jsonl", (metric_row(step, norm) for step, norm in enumerate(norms, 1)))
    page = folder / "page.html"
    assert command.main([folder], page) == 0
    found = columns(page)
    steps, drawn = found["step"], found["norm"]
    assert 2000 <= len(drawn) <= 8000
    assert (drawn[steps.index(12_346)], drawn[steps.index(23_457)]) == (50.0, 0.001)
    assert steps == sorted(set(steps))
    assert "lowest and the highest of each of 1,000 bins" in page.read_text()


def test_cells_are_geometric_means_of_the_bins_that_they_say(folder: Path) -> None:
    norms = {(step, layer): (step % 5 + 1) * 10.0**-layer for step in range(1, 11) for layer in range(3)}
    norms[7, 1], norms[8, 2] = math.nan, 0.0
    rows = ({"step": step, "layer": f"l{layer}", "norm": norm} for (step, layer), norm in norms.items())
    write_lines(folder / "layers.jsonl", rows)
    found = read_layers(folder / "layers.jsonl", max_cells=15)
    assert found.bins == ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10))
    assert [layer.name for layer in found.layers] == ["l0", "l1", "l2"]
    for row, layer in enumerate(found.layers):
        for (first, last), cell in zip(found.bins, layer.cells, strict=True):
            inside = [norms[step, row] for step in range(first, last + 1)]
            sound = [norm for norm in inside if 0 < norm < math.inf]
            assert cell == pytest.approx(math.prod(sound) ** (1 / len(sound)), rel=1e-12)
    assert [layer.broken for layer in found.layers] == [(), (3,), ()]
    assert [layer.zeros for layer in found.layers] == [(), (), ()], "another norm of that bin is positive"


def test_thousands_of_layers_share_rows(folder: Path) -> None:
    rows = ({"step": 1, "layer": f"l{layer}", "norm": 1.0 + layer % 2 * 3} for layer in range(2001))
    write_lines(folder / "layers.jsonl", rows)
    found = read_layers(folder / "layers.jsonl", max_cells=10_000)
    assert (len(found.layers), found.merged, found.rows) == (667, 3, 2001)
    assert found.layers[0].name == "l0 … l2 (3 layers)"
    assert found.layers[0].cells == (pytest.approx(4 ** (1 / 3)),)
    assert found.layers[0].spread[3] == 1.0


def test_percentiles_are_linear_between_neighbours() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    assert [percentile(values, percent) for percent in (0, 25, 50, 90, 100)] == pytest.approx(
        [1.0, 1.75, 3.0, 6.8, 8.0], rel=1e-15
    )
    assert percentile([5.0], 99.9) == 5.0
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.38112, "0.3811"),
        (12.5, "12.5"),
        (181_000.4, "181,000"),
        (1e-9, "1e-9"),
        (1.234e-7, "1.23e-7"),
        (2.5e30, "2.5e30"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert short(value) == text


def test_a_killed_run_can_be_read(folder: Path) -> None:
    write_run(folder, steps=50, layers=5)
    for name in ("metrics.jsonl", "layers.jsonl", "alerts.jsonl"):
        file = folder / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-20])
    (run,) = read_runs([folder])
    assert [step.step for step in run.steps.rows] == list(range(1, 50))
    assert (run.layers.rows, len(run.alerts), run.notes) == (249, 2, ())


def test_a_broken_line_within_is_left_out_and_said(folder: Path) -> None:
    lines = [json.dumps(metric_row(step, 1.0, clip_rate=0.0)) for step in (1, 2, 3, 4)]
    lines[1] = lines[1][:30] + lines[2]
    lines[2] = '{"step": 3, "grad_norm": []}'
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = read_steps(folder)
    assert [step.step for step in found.rows] == [1, 4]
    assert found.notes == ("metrics.jsonl: 2 lines could not be read and are left out, line 2 first",)


def test_the_last_row_of_a_step_counts(folder: Path) -> None:
    write_lines(
        folder / "metrics.jsonl", (metric_row(step, norm) for step, norm in ((1, 1.0), (2, 2.0), (2, 3.0)))
    )
    found = read_steps(folder)
    assert [step.norm for step in found.rows] == [1.0, 3.0]
    assert found.notes[0] == "metrics.jsonl: 1 row for a step again; the last of each step counts"


def test_rows_of_the_first_trainer_are_enough(folder: Path) -> None:
    keys = ("step", "loss", "grad_norm", "clip_coef", "threshold", "clipped", "finite")
    rows = [{key: metric_row(step, float(step))[key] for key in keys} for step in range(1, 251)]
    write_lines(folder / "metrics.jsonl", iter(rows))
    found = read_steps(folder)
    for place in (0, 99, 100, 249):
        window = [row["clipped"] for row in rows[max(0, place - 99) : place + 1]]
        assert found.rows[place].clip_rate == sum(window) / len(window)
    assert "no clip_rate" in found.notes[0]


@pytest.mark.parametrize("text", [None, "nonsense\n", '{"loss": 1}\n', "[1]\n"])
@pytest.mark.parametrize("name", ["report", "suggest-threshold"])
def test_what_is_no_run_is_refused(
    name: str, text: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (folder / "metrics.jsonl").write_text(text)
    assert cli.main([name, str(folder)]) == 2
    assert f"{folder}/metrics.jsonl" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_an_error(folder: Path) -> None:
    write_lines(folder / "metrics.jsonl", iter([metric_row(1, 1.0)]))
    with pytest.raises(RunError, match=r"expected to write the report to .*nowhere"):
        command.main([folder], folder / "nowhere" / "page.html")


def test_a_missing_plotly_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(folder / "metrics.jsonl", iter([metric_row(1, 1.0)]))
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(DistnormError, match=r"pip install 'distnorm\[report\]'"):
        command.main([folder], folder / "page.html")


def test_runs_get_the_shortest_names_that_tell_them_apart(tmp_path: Path) -> None:
    for name in ("a/run", "b/run"):
        (tmp_path / name).mkdir(parents=True)
        write_lines(tmp_path / name / "metrics.jsonl", iter([metric_row(1, 1.0)]))
    runs = read_runs([tmp_path / "a/run", tmp_path / "b/run/metrics.jsonl"])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert [run.name for run in read_runs([tmp_path / "a/run"])] == ["run"]


def test_a_large_run_is_a_page_under_8_mb(folder: Path) -> None:
    """2,000 steps, 300 layers; more monitored steps than 400 give no more cells."""
    write_run(folder, steps=2000, layers=300, every=5)
    page = folder / "page.html"
    command.main([folder], page)
    heat = next(figure for figure in figures(page) if figure["kind"] == "heat")
    assert (len(heat["layers"]["z"]), len(unpacked(heat["layers"]["z"][0]))) == (300, 400)
    assert page.stat().st_size < 8e6
    assert not re.search(r'(src|href)="(?!#)', page.read_text().split('<script type="application/json"')[0])


def test_suggested_thresholds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norms = [float(norm) for norm in range(1, 1001)]
    rows = [metric_row(step, norm, threshold=900.0) for step, norm in enumerate(norms, 5)]
    rows += [metric_row(1005, math.nan), metric_row(1006, math.inf)]
    write_lines(folder / "metrics.jsonl", iter(rows))
    assert thresholds.main(folder) == 0
    out = capsys.readouterr().out
    assert "1,000 steps, 5 to 1004, norms before clipping\nleft out: 2 steps" in out
    table = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if "%" in line and "run" not in line
    }
    assert list(table) == ["50", "75", "90", "95", "99", "99.9", "max"]
    for name, (threshold, rate, count) in table.items():
        exact = 1 + 9.99 * (100 if name == "max" else float(name))
        clipped = sum(exact / (norm + 1e-6) < 1 for norm in norms)
        assert (threshold, rate, count) == (f"{exact:.6g}", f"{clipped / 1000:.2%}", str(clipped))
    assert "The run itself clipped 101 of them, 10.10%." in out


def test_the_commands_need_neither_torch_nor_numpy(folder: Path) -> None:
    write_lines(folder / "metrics.jsonl", iter([metric_row(1, 1.0)]))
    code = """
        import sys
        from distnorm.cli import main
        page = sys.argv[1] + "/page.html"
        assert main(["suggest-threshold", sys.argv[1]]) == 0
        assert "plotly" not in sys.modules
        assert main(["report", sys.argv[1], "-o", page]) == 0
        print([name for name in ("torch", "numpy", "pandas") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(code), str(folder)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


@pytest.mark.parametrize(
    ("alerts", "said", "shown"),
    [
        (None, "no alerts.jsonl", "This run has no alerts.jsonl"),
        ([], "no alerts", "No alerts: every rule that is on found nothing."),
        ([{"step": 1, "kind": "non_finite", "message": "the norm is nan"}], "1 alert", "the norm is nan"),
    ],
)
def test_page_and_text_say_whether_there_were_alerts(
    alerts: list[Any] | None, said: str, shown: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(folder / "metrics.jsonl", [metric_row(1, 2.0)])
    if alerts is not None:
        write_lines(folder / "alerts.jsonl", alerts)
    page = folder / "page.html"
    assert command.main([folder], page) == 0
    assert capsys.readouterr().out.endswith(f"run: 1 step, {said}\n")
    assert shown in page.read_text()


def test_layers_are_shown_in_the_order_of_the_model(folder: Path) -> None:
    """That of the newest rows: a layer that came later stands where the model has it."""
    write_lines(folder / "metrics.jsonl", [metric_row(step, 2.0) for step in (1, 2)])
    orders = {1: ("tok", "gone", "blocks.10", "head"), 2: ("tok", "blocks.2", "blocks.10", "aux", "head")}
    layers = [
        {"step": step, "layer": name, "norm": 1.0, "rms": 1.0} for step in orders for name in orders[step]
    ]
    write_lines(folder / "layers.jsonl", layers)
    expected = [*orders[2], "gone"]
    assert [layer.name for layer in read_layers(folder / "layers.jsonl", 1000).layers] == expected
    page = folder / "page.html"
    assert command.main([folder], page) == 0
    named = [figure["layers"]["names"] for figure in figures(page) if figure["layers"]]
    assert named == [expected, expected]  # over steps, and spread
    text = page.read_text()
    picker = re.search(r"<select data-run.*?</select>", text, re.DOTALL)
    assert picker is not None and re.findall(r">([\w.]+)</option>", picker[0]) == expected
    for title in ("Layers over steps", "Spread of each layer"):
        table = text.split(f"{title} as a table", 1)[1].split("</table>", 1)[0]
        assert re.findall(r'<th scope="row">([\w.]+)</th>', table) == expected


def doctored(folder: Path) -> str:
    page = folder / "page.html"
    assert command.main([folder], page) == 0
    return page.read_text()


def test_a_doctors_report_in_the_folder_is_part_of_the_page(folder: Path) -> None:
    write_run(folder, steps=5, layers=4)
    assert "against one process" not in doctored(folder)
    explanation = {"mistake": "scaled", "text": "it is 2 times the right one", "ranks": [0, 1], "others": []}
    right = {"difference": 1e-8, "tolerance": 1e-6, "cosine": 1.0, "scale": 1.0, "is_dead": False}
    wrong = {**right, "difference": math.inf, "cosine": None, "explanations": [explanation]}
    parameters = [
        {"name": "tok.weight", **right, "explanations": []},
        {"name": "blocks.0.<b>.weight", **wrong},
        {"name": "blocks.0.<b>.bias", **right, "explanations": []},
        {"name": "head.weight", **right, "is_dead": True, "explanations": []},
    ]
    facts = {"ok": False, "ranks": 2, "parameters": parameters}
    facts["cause"] = {"where": "blocks.0.<b>.weight", "explanation": explanation}
    (folder / "doctor.json").write_text(json.dumps(facts))
    page = doctored(folder)
    assert "1 of 4 gradients on 2 ranks is wrong." in page
    assert "blocks.0.&lt;b&gt;.weight: scaled: it is 2 times the right one (ranks 0, 1)" in page
    assert '<li class="right">tok</li>' in page and '<li class="wrong">blocks.0.&lt;b&gt; <span>' in page
    assert '<li class="unproved">head <span>unproved</span></li>' in page and "<b>" not in page
    (folder / "doctor.json").write_text('{"format": 1, "parameters": {}}')  # as a dump's is
    page = doctored(folder)
    assert "against one process" not in page and "doctor.json is no report of distnorm doctor" in page
