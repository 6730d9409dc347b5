"""What a DeepSpeed JSON may not say, because it would change a result in silence."""

from types import SimpleNamespace

import pytest

from letit_dist.errors import UserError
from letit_dist.schemas import TrainingConfig
from letit_dist.training.plan import BatchPlan
from letit_dist.training.setup import configure_deepspeed


def configure(json: dict, *, several_phases: bool = True, inner: bool = False, precision: str = "fp32"):
    """The JSON as it is handed to DeepSpeed, and the accelerator that it was read from."""
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=json)))
    training = TrainingConfig(images=8, batch=8, precision=precision)
    plan = BatchPlan(8, 2, 2)
    configure_deepspeed(accelerator, plan, training, several_phases=several_phases, inner_gradients=inner)
    return json, accelerator


def test_the_batch_is_filled_in():
    json, accelerator = configure({"gradient_clipping": 0.0, "train_batch_size": "auto"})
    assert (json.pop("train_micro_batch_size_per_gpu"), json.pop("gradient_accumulation_steps")) == (2, 2)
    # Without the second key accelerate puts another Adam into the optimiser's place where that is offloaded.
    assert json == {"gradient_clipping": 0.0, "zero_force_ds_cpu_optimizer": False}
    assert accelerator.gradient_accumulation_steps == 2


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("json", "precision", "message"),
    [
        ({}, "fp32", "has no gradient_clipping: write 0.0"),
        ({"gradient_clipping": 0.0, "bf16": {"enabled": True}}, "fp32", "enables bf16, which casts the parameters"),
        ({"gradient_clipping": 0.0, "fp16": {"enabled": True}}, "fp32", "enables fp16, which casts the parameters"),
        ({"gradient_clipping": 0.0, "zero_optimization": {"stage": 3}}, "fp32", "asks for ZeRO stage 3, which repeats"),
        ({"gradient_clipping": 0.0, "zero_optimization": OFFLOAD}, "fp32", "repeats old gradients for networks"),
        ({"gradient_clipping": 0.0}, "fp64", "training.precision: fp64 is for equality checks under DDP"),
    ],
)
def test_what_would_change_a_result_in_silence_is_refused(json, precision, message):
    with pytest.raises(UserError, match=message):
        configure(json, precision=precision)


@pytest.mark.parametrize("zero", [OFFLOAD, {"stage": 3}])
def test_stage_3_and_offloading_are_left_to_recipes_of_one_phase(zero):
    json, _ = configure({"gradient_clipping": 0.0, "zero_optimization": dict(zero)}, several_phases=False)
    assert json["zero_optimization"] == zero


def test_stage_3_is_refused_where_a_step_takes_gradients_itself():
    json = {"gradient_clipping": 0.0, "zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match="which has no parameters at hand where a step itself takes gradients"):
        configure(json, several_phases=False, inner=True)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "to nvme: to cpu, or not at all"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "remove offload_param"),
    ],
)
def test_offloading_elsewhere_is_refused(zero, message):
    with pytest.raises(UserError, match=message):
        configure({"gradient_clipping": 0.0, "zero_optimization": zero}, several_phases=False)
