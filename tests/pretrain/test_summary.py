import json

import pytest

from mindspeed_nsa.pretrain.summary import describe, plot, read_metrics, series


@pytest.fixture
def run_dir(tmp_path):
    rows = [
        {"iteration": 0, "valid_loss": 5.5512, "unigram_loss": 3.2345},
        {"iteration": 1, "loss": 5.5},
        {"iteration": 2, "loss": 4.5, "valid_loss": 4.4321},
        {"iteration": 3, "loss": 3.5, "valid_loss": 3.1111},
    ]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_losses_stand_beside_each_other(run_dir):
    text = describe(run_dir)
    numbers = [line.split()[-1] for line in text.splitlines() if line.startswith("  ")]
    assert numbers == ["5.5512", "3.2345", "3.1111"]
    assert "after 3 iterations" in text
    assert f"{run_dir} (3 iterations)" in text


def test_the_sample_is_shown_without_what_a_terminal_would_obey(run_dir):
    (run_dir / "sample.txt").write_text("def f():\n\treturn 'é'\x1b[2J\n")
    assert describe(run_dir).endswith("\n\ndef f():\n\treturn 'é'\ufffd[2J")


def test_a_run_without_evaluation_says_so(run_dir):
    (run_dir / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    assert "no evaluation on held-out text" in describe(run_dir)


def test_series_skip_rows_without_the_key(run_dir):
    rows = read_metrics(run_dir)
    assert series(rows, "loss") == ([1, 2, 3], [5.5, 4.5, 3.5])
    assert series(rows, "valid_loss") == ([0, 2, 3], [5.5512, 4.4321, 3.1111])


def test_the_picture_draws_every_run(run_dir, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, path: (drawn.append(self.axes[0]), save(self, path)))
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    plot([run_dir, other], tmp_path / "new" / "loss.png")
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn[0].lines}
    assert lines == {
        "run: training": [5.5, 4.5, 3.5],
        "run: held-out": [5.5512, 4.4321, 3.1111],
        "other: training": [2.0],
        "unigram of the training text: 3.23": [3.2345, 3.2345],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("", "empty"), ('{"iteration": 1}\n[]\n', "line 2"), ("{", "line 1")],
)
def test_bad_metrics_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl: .*{message}"):
        read_metrics(tmp_path)


def test_only_a_png_is_drawn(run_dir, tmp_path):
    with pytest.raises(ValueError, match=r"must end with \.png"):
        plot([run_dir], tmp_path / "loss.svg")
