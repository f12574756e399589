import shlex
import sys
from pathlib import Path

import pytest

from mindspeed_nsa.cli import main
from mindspeed_nsa.launch import run as module
from mindspeed_nsa.launch.environment import shown
from mindspeed_nsa.pretrain.job import Job

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
PYTHON = sys.executable


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No launch described by the environment."""
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPUS_PER_NODE", "HOSTFILE", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def launch(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["launch", "--config", TINY, *map(str, arguments)])
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


def commands(output):
    """What a dry run prints, node after node: title, environment, and the words of each command."""
    for part in output.strip().split("\n\n"):
        title, *lines = part.splitlines()
        exports = [line.removeprefix("export ") for line in lines if line.startswith("export ")]
        text = "\n".join(line for line in lines if not line.startswith("export "))
        words = [shlex.split(command) for command in text.replace(" \\\n", " ").splitlines()]
        yield title, dict(shlex.split(export)[0].split("=", 1) for export in exports), words


def test_a_dry_run_of_two_nodes_prints_all_that_each_runs(launch, sources, monkeypatch):
    monkeypatch.setenv("HCCL_SOCKET_IFNAME", "eth 1")
    overrides = ["parallel.tensor_model_parallel_size=2", "nsa.window_size=256", "megatron.flash=true"]
    code, out, err = launch("--dry-run", "--nnodes", 2, "--master-addr", "first", "--nproc-per-node", 2, *overrides)
    assert (code, err) == (0, "")
    nodes = list(commands(out))
    assert [title for title, *_ in nodes] == ["# node 0 of 2", "# node 1 of 2"]
    for rank, (_, environment, (doctor, torchrun)) in enumerate(nodes):
        assert environment == shown() and environment["HCCL_SOCKET_IFNAME"] == "eth 1"
        assert environment["MEGATRON_LM_PATH"] == str(sources[0])
        examine = [PYTHON, "-m", "mindspeed_nsa.cli", "doctor", "--config", TINY, "--trainer", "mindspeed"]
        assert doctor == [*examine, *overrides]
        where = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "2", "--master-addr", "first"]
        start = [PYTHON, "-m", "torch.distributed.run", *where, "--master-port", "6000"]
        flags = module.megatron_arguments(Job.read(TINY, overrides), TINY, overrides)
        assert torchrun == [*start, "-m", "mindspeed_nsa.launch.pretrain_mindspeed", *flags]
        assert {"--flash", "--nsa-window-size", "--nsa-config"} <= set(torchrun)


def test_a_dry_run_of_the_builtin_trainer_asks_for_no_host(launch, tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATRON_LM_PATH", raising=False)
    (tmp_path / "hosts").write_text("198.51.100.1\n198.51.100.2\n")
    code, out, _ = launch("--dry-run", "--trainer", "builtin", "--hostfile", tmp_path / "hosts", "training.seed=3")
    assert code == 0
    (first, _, _), (second, _, (_, torchrun)) = commands(out)
    assert (first, second) == ("# node 0 (198.51.100.1) of 2", "# node 1 (198.51.100.2) of 2")
    assert torchrun[torchrun.index("--master-addr") + 1] == "198.51.100.1"
    assert torchrun[-5:] == ["-m", "mindspeed_nsa.pretrain", "--config", TINY, "training.seed=3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.num_lyers=3"], "model.num_lyers: unknown key; did you mean num_layers?"),
        (["parallel.tensor_model_parallel_size=2"], "does not divide the 1 ranks that were started"),
        (
            ["--nproc-per-node", "8", "parallel.tensor_model_parallel_size=4"],
            "which megatron-core splits over ranks from 0.16 on",
        ),
        (
            ["megatron.flas=true"],
            "megatron.flas: neither Megatron-LM nor MindSpeed here has that argument",
        ),
        (["--trainer", "builtin", "model.num_experts=4"], "model.num_experts: 4; the trainer here has no experts"),
        (["model.num_experts=4", "parallel.expert_model_parallel_size=2"], "2 * expert_tensor_parallel_size 1 does not divide"),
    ],
)
def test_a_job_that_cannot_work_is_one_line_that_names_the_file(launch, sources, arguments, message):
    code, out, err = launch("--dry-run", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"mindspeed-nsa: {TINY}: ") and message in err


@pytest.mark.parametrize("name", ["MEGATRON_LM_PATH", "MINDSPEED_PATH"])
def test_a_host_that_is_missing_is_named(launch, sources, monkeypatch, name):
    monkeypatch.delenv(name)
    code, _, err = launch("--dry-run")
    assert code == 2 and name in err


def test_the_exit_code_and_the_output_of_what_is_run(tmp_path, capfdbinary):
    log = tmp_path / "log"
    for _ in range(2):
        assert module._tee(["sh", "-c", "echo out; echo err >&2; exit 3"], {}, log) == 3
    assert capfdbinary.readouterr().out == b"out\nerr\n" * 2
    assert log.read_bytes() == b"out\nerr\n" * 2, "a restart appends"
