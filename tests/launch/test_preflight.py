"""Nodes are threads here, with sockets between them; their doctors are stand-ins, a line of shell."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from mindspeed_nsa.launch.nodes import Nodes
from mindspeed_nsa.launch.preflight import preflight

FIT = ["sh", "-c", "echo fine"]
FAULTY = ["sh", "-c", "echo 'job  data   FAULT  no such   file'; echo 'verdict this job FAULT see data'; exit 1"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def preflights(*doctors, nnodes=None, names=(), patience=60):
    """What each node ends with: nothing, or its error."""
    nnodes, port = nnodes or len(doctors), free_port()

    def run(rank):
        try:
            preflight(Nodes(nnodes, rank, "127.0.0.1", port, tuple(names)), doctors[rank], {}, patience)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, range(len(doctors))))


def test_one_node_asks_nobody(capfd):
    preflight(Nodes(1, 0, "nowhere.invalid", 1), FIT, {})
    with pytest.raises(
        ValueError, match=rf"nothing was started: node 0 \({socket.gethostname()}\): job data FAULT no such file$"
    ):
        preflight(Nodes(1, 0, "nowhere.invalid", 1), FAULTY, {})
    out, err = capfd.readouterr()
    assert out == "" and "verdict this job FAULT" in err, "what the doctor says of a fault is shown, and nothing else"


def test_a_doctor_that_says_nothing():
    with pytest.raises(ValueError, match="the doctor ended with exit code 3"):
        preflight(Nodes(1, 0, "", 1), ["sh", "-c", "exit 3"], {})


def test_all_nodes_learn_of_one_that_is_not_fit():
    message = "preflight failed, nothing was started: node 1 (second): job data FAULT no such file"
    assert preflights(FIT, FAULTY, FIT, names=("first", "second", "third")) == [message] * 3


def test_fit_nodes_go_on():
    assert preflights(FIT, FIT) == ["", ""]


def test_a_node_that_is_not_heard_from_is_named():
    message = "preflight: not heard from within 1 s: node 1; is the launch running there?"
    assert preflights(FIT, nnodes=2, patience=1) == [message]
