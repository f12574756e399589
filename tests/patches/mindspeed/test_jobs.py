"""Whole jobs with NSA under MindSpeed, on the emulated device: what a user starts, in many layouts."""

import pytest
from conftest import ENGINE, GQA, LOCAL

ON = {"experimental-attention-variant": "nsa"}
REFERENCE = ON | {"nsa-backend": "reference"}  # float32
ASCEND = ON | {"bf16": True}
TP2 = {"tensor-model-parallel-size": 2}


@pytest.fixture(scope="module")
def expected(run_job):
    """The losses of one process, local spec, float32, on the reference operators."""
    return run_job(LOCAL, GQA, REFERENCE).losses


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        pytest.param(ENGINE, 1, id="transformer engine"),
        pytest.param(LOCAL | TP2, 2, id="tp2"),
        pytest.param(ENGINE | TP2 | {"sequence-parallel": True}, 2, id="tp2 sp"),
        pytest.param(LOCAL | {"use-distributed-optimizer": True}, 2, id="dp2"),
        pytest.param(LOCAL | {"use-flash-attn": True, "recompute-granularity": "selective"}, 1, id="selective"),
    ],
)
def test_layouts_train_the_same_model(run_job, expected, flags, ranks):
    job = run_job(GQA, REFERENCE, flags, ranks=ranks)
    assert job.cores == {0: "NSACore", 1: "NSACore"}
    assert job.losses == pytest.approx(expected, abs=5e-5)
