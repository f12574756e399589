from pathlib import Path

import pytest

from mindspeed_nsa.plan.nearest import read

CONFIG = Path(__file__).parents[2] / "configs" / "nsa_27b.yaml"


@pytest.mark.parametrize(
    ("overrides", "trainer", "fault", "near"),
    [
        (["tensor_model_parallel_size=3"], "mindspeed", "does not divide num_attention_heads 64", "2 or 4"),
        (["tensor_model_parallel_size=8"], "mindspeed", "more than num_query_groups 4", "4"),
        (["pipeline_model_parallel_size=4"], "mindspeed", "num_layers: 30 does not divide", "2"),
        (["expert_model_parallel_size=16"], "mindspeed", "does not divide num_experts 72", "8"),
        (
            ["context_parallel_size=3", "cp_comm_type=a2a"],
            "builtin",
            "model.seq_length: 8192 is not a multiple of 24",
            "2 or 4",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_nearest_that_can(overrides, trainer, fault, near):
    """One line, which names the key that was given; and the nearest really can."""
    key = overrides[0].partition("=")[0]
    changed = [f"parallel.{override}" for override in overrides]
    with pytest.raises(ValueError) as refused:
        read(CONFIG, changed, 16, trainer)
    line = str(refused.value)
    assert line.startswith(f"{CONFIG}: ") and fault in line and "\n" not in line
    assert f"the nearest that can: parallel.{key} {near}" in line
    for value in near.split(" or "):
        read(CONFIG, [*changed, f"parallel.{key}={value}"], 16, trainer)


def test_batches_and_lengths():
    with pytest.raises(ValueError, match=r"the nearest that can: training\.global_batch_size 2304 or 2336$"):
        read(CONFIG, ["training.global_batch_size=2305"], 128, "mindspeed")
    with pytest.raises(
        ValueError, match=r"the nearest that can: model\.seq_length 8200 or 8204, parallel\.tensor_model_parallel_size 2$"
    ):
        read(CONFIG, ["model.seq_length=8202"], 16, "mindspeed")


def test_what_no_number_mends_is_refused_alone():
    with pytest.raises(ValueError) as refused:
        read(CONFIG, ["model.swigluu=true"], 16, "mindspeed")
    assert "did you mean swiglu?" in str(refused.value) and "nearest" not in str(refused.value)


def test_a_section_that_is_none_or_text(tmp_path):
    empty, text = tmp_path / "empty.yaml", tmp_path / "text.yaml"
    content = (CONFIG.parent / "tiny.yaml").read_text()
    empty.write_text(content.replace("  tensor_model_parallel_size: 1\n", ""))
    with pytest.raises(ValueError, match=r"parallel: input should be"):
        read(empty, [], 2, "builtin")
    text.write_text(content.replace("parallel:\n  tensor_model_parallel_size: 1\n", "parallel: two\n"))
    with pytest.raises(ValueError, match=r"parallel: input should be"):
        read(text, [], 2, "builtin")


def test_the_trainers_differ():
    split = ["parallel.tensor_model_parallel_size=8"]
    assert read(CONFIG, split, 16, "builtin").megatron == {}
    assert read(CONFIG, [], 16, "mindspeed").megatron["moe_token_dispatcher_type"] == "alltoall"
    context = ["parallel.context_parallel_size=2", "parallel.cp_comm_type=a2a"]
    with pytest.raises(ValueError, match="MindSpeed job with NSA does not"):
        read(CONFIG, context, 16, "mindspeed")
