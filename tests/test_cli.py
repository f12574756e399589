import json
import subprocess
import sys

import pytest

from mindspeed_nsa.cli import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text("text")
    (folder / "binary.txt").write_bytes(b"\xff")
    return folder


def test_prepare_writes_and_says_what(corpus, tmp_path, capsys):
    pytest.importorskip("megatron.core")
    code, out, err = run(capsys, "prepare", corpus, "--output-prefix", tmp_path / "out/t", "--held-out", 0.25)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{tmp_path}/out/t_train: 3 documents, 15 tokens",
        f"{tmp_path}/out/t_valid: 1 documents, 5 tokens",
        "left out, not UTF-8: 1 files, the first is corpus/binary.txt",
    ]
    assert (tmp_path / "out/t_train.bin").stat().st_size == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["prepaer"], "No such command 'prepaer'"),
        (["prepare", "--output-prefix", "x"], "give text files or folders, or --python-sources"),
        (["prepare", "/nowhere", "--output-prefix", "x"], "/nowhere: no such file or folder"),
        (["prepare", "/nowhere"], "Missing option '--output-prefix'"),
        (["prepare", "/nowhere", "--output-prefix", "x", "--tokenizer-type", "Bytes"], "'Bytes' is none of"),
        (["summary", "/nowhere"], "/nowhere/metrics.jsonl: no such file"),
        (["plot", "/nowhere", "--output", "x.png"], "/nowhere/metrics.jsonl: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("mindspeed-nsa: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named(capsys, corpus):
    code, _, err = run(capsys, "prepare", corpus, "--output-prefix", corpus / "0.txt" / "x")
    assert code == 2
    assert f"{corpus}/0.txt" in err and err.count("\n") == 1


def test_help_is_no_mistake(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert {"prepare", "summary", "plot"} <= set(out.split())


def test_summary_and_plot_read_a_run(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "loss": 2.0, "valid_loss": 1.5}) + "\n")
    code, out, _ = run(capsys, "summary", tmp_path)
    assert code == 0 and "1.5000" in out
    code, out, _ = run(capsys, "plot", tmp_path, "--output", tmp_path / "loss.png")
    assert (code, out.strip()) == (0, str(tmp_path / "loss.png"))


def test_the_command_is_installed():
    command = [sys.executable, "-c", "from mindspeed_nsa.cli import main; main(['summary', '/nowhere'])"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "mindspeed-nsa: /nowhere/metrics.jsonl: no such file or directory\n")
