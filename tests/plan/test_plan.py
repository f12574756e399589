import json
from pathlib import Path

import pytest

from mindspeed_nsa.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_plan_of_one_job(capsys):
    layout = ("parallel.context_parallel_size=2", "parallel.cp_comm_type=a2a", "parallel.tensor_model_parallel_size=2")
    code, out, err = run(capsys, "--config", CONFIGS / "tiny.yaml", "--trainer", "builtin", "--ranks-per-node", "4", *layout)
    assert (code, err) == (0, "")
    cells = {row[0]: row[1:] for row in rows(out)}
    assert cells["query heads held"] == ["8", "4"]
    assert cells["key/value groups held"] == ["2", "1"]
    assert cells["ranks that choose the blocks of a group together"] == ["", "2"]
    assert cells["compress attention"] == ["1", "4", "1", "1,536", "95"]
    assert cells["select attention"] == ["1", "2", "1", "1,536", "1,536"]
    assert cells["compress"] == ["2, keys and values", "", "1", "", "1,536 to 95"]
    repeated = "beside the model: compressed tokens, by each rank for all that share its groups"
    assert cells[repeated] == cells["NSA: compressed tokens"]
    assert "context 2 by a2a" in out and "2 micro-batches of 1 x 1,536 tokens" in out
    assert {"**tensor**", "**scores**", "**context**", "**data**"} <= cells.keys()
    assert cells["multiplications"] == ["unknown: no peak of float32 is published"]


def test_a_sweep_is_a_table_and_files(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = run(
        capsys,
        *("--config", CONFIGS / "nsa_27b.yaml", "--vocab-size", 129280, "--nodes", "1,8"),
        *("--sequence-lengths", "8192,32768,9001", "--output", tmp_path / "plan"),
    )
    assert (code, err) == (0, "")
    head, _, *cells = rows(out)
    assert head[:5] == ["nodes", "tokens", "GB a rank", "seconds a step, at least", "by"]
    assert [row[:2] for row in cells] == [[n, t] for n in ("1", "8") for t in ("8,192", "32,768", "9,001")]
    assert cells[0][2:5] == ["54.4", "153", "multiplications"]
    assert cells[1][2].endswith("too much") and cells[2][2].startswith("refused: ")
    assert out.splitlines()[-3:] == [str(tmp_path / "plan" / f"plan.{suffix}") for suffix in ("md", "json", "png")]
    data = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert [cell.get("ranks") for cell in data] == [16, 16, None, 128, 128, None]
    assert sum(data[0]["stages"][0]["memory"].values()) == pytest.approx(2 * data[0]["stages"][0]["memory"]["total"])
    assert (tmp_path / "plan" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plan" / "plan.md").read_text() in out


def test_the_fullest_stage_is_shown(capsys):
    stages = ("parallel.pipeline_model_parallel_size=2", "model.seq_length=32768")
    code, out, _ = run(capsys, "--config", CONFIGS / "nsa_27b.yaml", "--vocab-size", "129280", *stages)
    assert code == 0 and "of stage 1, counted from 0" in out
    assert ["layers", "30", "15"] in rows(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "1,x"), "--nodes: '1,x'; allowed: numbers from 1 with commas between them, such as 1,8,64"),
        (
            (),
            "tokenizers/deepseek-vl2/tokenizer.json: no such file; --vocab-size says how many tokens it has",
        ),
        (("parallel.tensor_model_parallel_size=3",), "nearest that can: parallel.tensor_model_parallel_size 2 or 4"),
        (("--sequence-lengths", "9001,9003"), "model.seq_length: 9001 does not divide"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(capsys, arguments, message):
    code, out, err = run(capsys, "--config", CONFIGS / "nsa_27b.yaml", *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_neither_megatron_nor_torch_distributed_is_asked(capsys, monkeypatch):
    import importlib.metadata

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setitem(__import__("sys").modules, "megatron.core", None)
    code, out, _ = run(capsys, "--config", CONFIGS / "tiny.yaml", "--ranks-per-node", "2", "training.bf16=true")
    assert code == 0 and "a step, at least" in out
