import os

import pytest

from mindspeed_nsa.doctor import FAULT, NOTE, OK, draw, examine

EMULATED = "EMULATED_CANN" in os.environ


def test_the_doctor_finds_a_device_whose_operators_hold(capsys):
    rows = examine()
    assert not [row for row in rows if row.status == FAULT]
    assert {row.status for row in rows if row.topic == "operators"} == {OK}
    (plan,) = (row for row in rows if row.subject == "plan")
    assert plan.finding.startswith(("plan A", "plan B"))
    assert rows[-1].finding == "runs on the NPU" + ", emulated" * EMULATED
    draw(rows)
    out = capsys.readouterr().out
    assert "error" in out and "allowed" in out and ("emulated: nothing here was run on a chip" in out) == EMULATED


@pytest.mark.skipif(not EMULATED, reason="needs the emulated device")
def test_the_doctor_notes_a_device_that_needs_plan_b():
    from tests.emulated_cann import device

    with device.use_variants(forward_ignores_mask=True):
        rows = examine()
    assert rows[-1].status == OK
    assert {row.status for row in rows if row.topic == "probe"} == {OK, NOTE}
    assert [row for row in rows if row.subject == "plan" and row.finding.startswith("plan B")]
