import socket

import pytest

from mindspeed_nsa.cli import main
from mindspeed_nsa.launch.nodes import Nodes, find_nodes


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hosts(tmp_path):
    def write(*lines):
        (tmp_path / "hosts").write_text("\n".join(lines))
        return tmp_path / "hosts"

    return write


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM step; `scontrol` is a stand-in that prints its hosts."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames a[1-3]" ] && printf "a1\\na2\\na3\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, value in (("JOB_NODELIST", "a[1-3]"), ("NODEID", "2"), ("STEP_NUM_TASKS", "3"), ("STEP_NUM_NODES", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_one_node_needs_nothing():
    assert find_nodes(None, None, None) == Nodes(1, 0, "localhost", 6000)
    assert find_nodes(1, 0, "here", 7000) == Nodes(1, 0, "here", 7000)


def test_nodes_given_one_by_one():
    assert find_nodes(3, 2, "first", 6001) == Nodes(3, 2, "first", 6001)


def test_a_host_file_tells_the_rank(hosts):
    own = socket.gethostname()
    path = hosts("# the nodes", "198.51.100.1 slots=16", f"{own}  # this one", "", "198.51.100.3")
    assert find_nodes(None, None, None, hostfile=path) == Nodes(
        3, 1, "198.51.100.1", 6000, ("198.51.100.1", own, "198.51.100.3")
    )
    assert find_nodes(3, 2, "198.51.100.9", hostfile=path)[1:3] == (2, "198.51.100.9")


def test_a_host_file_may_have_this_host_by_address(hosts):
    assert find_nodes(None, None, None, hostfile=hosts("198.51.100.1", "127.0.0.1")).rank == 1


def test_slurm_tells_all(slurm):
    assert find_nodes(None, None, None, 6100) == Nodes(3, 2, "a1", 6100, ("a1", "a2", "a3"))
    assert find_nodes(1, None, None) == Nodes(1, 0, "localhost", 6000), "NNODES goes before SLURM"


def test_slurm_starts_one_a_node(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "48")
    with pytest.raises(ValueError, match=r"^SLURM: srun started 48 tasks on 3 nodes; .*--ntasks-per-node=1$"):
        find_nodes(None, None, None)


def test_slurm_without_scontrol(slurm, tmp_path):
    (tmp_path / "scontrol").unlink()
    with pytest.raises(ValueError, match=r"scontrol show hostnames a\[1-3\]: .*; give NNODES, NODE_RANK and MASTER_ADDR$"):
        find_nodes(None, None, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((2, None, "a"), "NODE_RANK: not set; with NNODES 2 each node needs its own, 0 to 1"),
        ((2, 2, "a"), "NODE_RANK: 2, but NNODES is 2; allowed: 0 to 1"),
        ((None, 1, None), "NODE_RANK: 1, but NNODES is 1; allowed: 0"),
        ((2, 0, None), "MASTER_ADDR: not set; with NNODES 2 it is the name or address of node 0"),
    ],
)
def test_what_is_missing_or_wrong(given, message):
    with pytest.raises(ValueError) as caught:
        find_nodes(*given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("lines", "given", "message"),
    [
        (("198.51.100.1", "198.51.100.2"), (None, None, None), "is not in it; it has 198.51.100.1, 198.51.100.2"),
        (("198.51.100.1", "198.51.100.2"), (3, None, None), "NNODES: 3, but HOSTFILE"),
        (("# none",), (None, None, None), "no host in it; one a line, the first is node 0"),
        (("a", "b", "a"), (None, None, None), "a is there 2 times"),
        (("127.0.0.1", "127.0.0.2"), (None, None, None), "NODE_RANK: not set, and 127.0.0.1 and 127.0.0.2 of"),
    ],
)
def test_host_files_that_do_not_do(hosts, lines, given, message):
    with pytest.raises(ValueError) as caught:
        find_nodes(*given, hostfile=hosts(*lines))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_dry_run_needs_no_node(hosts):
    path = hosts("198.51.100.1", "198.51.100.2")
    assert find_nodes(None, None, None, hostfile=path, dry_run=True).rank == 0
    assert find_nodes(2, None, "a", dry_run=True).rank == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MASTER_PORT", "many", "'--master-port' (env var: 'MASTER_PORT')"),
        ("MASTER_PORT", "70000", "'--master-port' (env var: 'MASTER_PORT')"),
        ("NNODES", "0", "'--nnodes' (env var: 'NNODES')"),
        ("NPUS_PER_NODE", "x", "'--nproc-per-node' (env var: 'NPUS_PER_NODE')"),
        ("HOSTFILE", "/nowhere", "HOSTFILE: /nowhere: no such file"),
    ],
)
def test_a_variable_that_is_wrong_is_one_line(monkeypatch, capsys, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        main(["launch", "--config", "configs/tiny.yaml"])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err
