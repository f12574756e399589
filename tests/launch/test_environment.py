import re
from pathlib import Path

from mindspeed_nsa.launch.environment import OF_THE_MACHINE, VARIABLES, complete, shown

PAGE = Path(__file__).parents[2] / "docs" / "launch.md"


def test_what_the_user_has_set_stays():
    assert complete({"TASK_QUEUE_ENABLE": "1", "OTHER": "x"})["TASK_QUEUE_ENABLE"] == "1"
    assert complete({"OTHER": "x"}) == {variable.name: variable.value for variable in VARIABLES} | {"OTHER": "x"}


def test_what_is_shown(monkeypatch):
    for name in OF_THE_MACHINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HCCL_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "60")
    assert {"HCCL_SOCKET_IFNAME": "eth1", "HCCL_EXEC_TIMEOUT": "60", "TASK_QUEUE_ENABLE": "2"}.items() <= shown().items()
    assert len(shown()) == len(VARIABLES) + 1


def test_the_page_has_the_same_table():
    page = PAGE.read_text()
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.+) \|$", page, re.MULTILINE)
    assert rows == [tuple(variable) for variable in VARIABLES]
    assert set(OF_THE_MACHINE) <= set(re.findall(r"`([A-Z_]+)`", page.partition("Yours to set")[2]))
