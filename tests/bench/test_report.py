"""What the benchmark writes, from figures made by hand, and one small run of it."""

import json
import weakref

import pytest
import torch

pytest.importorskip("mindspeed_nsa.ops.cpu", reason="the native kernels are not built", exc_type=ImportError)
from mindspeed_nsa.bench import report, runner
from mindspeed_nsa.bench.measure import Ceilings, Clock, Spread, peak_bytes
from mindspeed_nsa.bench.runner import Result, Row, _carry

MACHINE = {"date": "2026-01-02", "processor": "2 x Some CPU", "instruction set": "avx2", "torch": "2.7.1"}


def row(contender, direction, tokens, milliseconds, threads=1):
    cpu, wall = Spread(milliseconds, milliseconds - 1, milliseconds + 1), Spread(*[10 * milliseconds] * 3)
    return Row(contender, direction, threads, tokens, tokens, 3, cpu, wall, 40.0)


@pytest.fixture
def result():
    rows = [
        row(name, direction, tokens, (20 if name == report.FLASH else 5) * tokens / 1024)
        for name in (report.NSA, report.FLASH)
        for direction in ("forward", "backward")
        for tokens in (1024, 2048)
    ]
    rows += [_carry(x, 8192) for x in rows if x.contender == report.FLASH and x.tokens == 2048]
    rows += [row(report.NSA, direction, 8192, 80) for direction in ("forward", "backward")]
    return Result(MACHINE, "bfloat16", 20.0, {1: Ceilings(3e12, 2e9, 2e10)}, ["somebody is not installed"], rows)


def test_table(result):
    """Ratios of medians; what was carried says so, by T^2, and memory by T."""
    table = report.markdown(result)
    assert "2026-01-02, 2 x Some CPU, avx2, torch 2.7.1, bfloat16" in table
    assert "Not measured: somebody is not installed." in table
    assert "3.00 TFLOP/s in registers, 2.00 G exponentials/s" in table
    assert "| torch flash attention | 20 [19, 21] | 40 [39, 41] | 640* [624, 656] |" in table
    assert table.count("| **flash / NSA, whole** | **4.0** | **4.0** | **8.0** |") == 2
    assert "| torch flash attention | 40 | 40 | 160* |" in table


def test_several_threads_are_timed_on_the_wall(result):
    rows = [x._replace(threads=2) for x in result.rows]
    table = report.markdown(result._replace(rows=rows, ceilings={2: result.ceilings[1]}))
    assert "### 2 threads" in table and "| NSA, whole | 50 [50, 50] |" in table


def test_written(result, tmp_path):
    table, data, picture = report.write(result, tmp_path / "new")
    assert [x.name for x in (table, data, picture)] == ["bench.md", "bench.json", "bench_1.png"]
    assert json.loads(data.read_text())["rows"][0]["cpu"] == {"median": 5.0, "low": 4.0, "high": 6.0}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_operations():
    """Dense: half of the square, with its diagonal. NSA: a sixteenth of that, the chosen blocks and the window."""
    assert report.operations(report.FLASH, "forward", 4) == 2 * 16 * (192 + 128) * 10
    assert report.operations(report.NSA, "backward", 4) == 2 * 16 * (3 * 192 + 2 * 128) * (10 / 16 + 10 + 10)


def test_peak_bytes():
    """That of the call, not of the process before it."""
    big = torch.ones(1 << 24)
    del big
    assert 0.98 * 2**25 < peak_bytes(lambda: torch.ones(1 << 23)) < 1.2 * 2**25


def test_a_clock_keeps_no_result():
    results = []

    def run():
        result = torch.ones(1)
        results.append(weakref.ref(result))
        return result

    clock = Clock(run)
    assert clock.wall > 0 and results[0]() is None


def test_a_run(monkeypatch, tmp_path):
    """Of two contenders: the ratio in the table is that of the figures in the file."""
    both = [x for x in runner.contenders() if x.name in (report.NSA, report.FLASH)]
    monkeypatch.setattr(runner, "contenders", lambda: both)
    monkeypatch.setattr(runner, "check", lambda dtype: None)  # minutes of compiling
    for number, result in enumerate(runner.run([1024, 2048], [1], torch.bfloat16, 5.0, print), start=1):
        report.write(result, tmp_path)
        assert {x.tokens for x in result.rows} == set([1024, 2048][:number])
    data = json.loads((tmp_path / "bench.json").read_text())
    medians = {(x["contender"], x["direction"], x["tokens"]): x["cpu"]["median"] for x in data["rows"]}
    for direction in ("forward", "backward"):
        ratios = [medians[report.FLASH, direction, n] / medians[report.NSA, direction, n] for n in (1024, 2048)]
        line = " | ".join(f"**{x:.1f}**" for x in ratios)
        assert f"| **flash / NSA, whole** | {line} |" in (tmp_path / "bench.md").read_text()
    assert {x["measured_at"] == x["tokens"] for x in data["rows"]} == {True}
    assert all(x["peak_mib"] > 0 for x in data["rows"] if x["contender"] == report.NSA)
