import pytest

from mindspeed_nsa.ops.schemas import SCHEMAS, differences, installed


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_installed_operator_takes_what_this_project_hands_it(name):
    schema = installed(name)
    assert schema is not None, f"this torch_npu has no {name}"
    assert differences(name, schema) == []


def test_an_operator_that_is_not_there_is_none():
    assert installed("npu_nsa_absent") is None
