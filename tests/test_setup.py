"""What a DeepSpeed JSON may not say, because it would change a result in silence."""

from types import SimpleNamespace

import pytest

from letit_dist.config import TrainingConfig
from letit_dist.errors import UserError
from letit_dist.training.plan import BatchPlan
from letit_dist.training.setup import configure_deepspeed


def configure(json: dict, *, several_phases: bool = True, precision: str = "fp32"):
    """The JSON as it is handed to DeepSpeed, and the accelerator that it was read from."""
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=json)))
    training = TrainingConfig(images=8, batch=8, precision=precision)
    configure_deepspeed(accelerator, BatchPlan(8, 2, 2), training, several_phases=several_phases)
    return json, accelerator


def test_the_batch_is_filled_in():
    json, accelerator = configure({"gradient_clipping": 0.0, "train_batch_size": "auto"})
    assert json == {"gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert accelerator.gradient_accumulation_steps == 2


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("json", "precision", "message"),
    [
        ({}, "fp32", "has no gradient_clipping: write 0.0"),
        ({"gradient_clipping": 0.0, "bf16": {"enabled": True}}, "fp32", "enables bf16, which casts the parameters"),
        ({"gradient_clipping": 0.0, "fp16": {"enabled": True}}, "fp32", "enables fp16, which casts the parameters"),
        ({"gradient_clipping": 0.0, "zero_optimization": {"stage": 3}}, "fp32", "ZeRO stage 3 is not supported"),
        ({"gradient_clipping": 0.0, "zero_optimization": OFFLOAD}, "fp32", "repeats old gradients for networks"),
        ({"gradient_clipping": 0.0}, "fp64", "training.precision: fp64 is for equality checks under DDP"),
    ],
)
def test_what_would_change_a_result_in_silence_is_refused(json, precision, message):
    with pytest.raises(UserError, match=message):
        configure(json, precision=precision)


def test_offloading_is_left_to_recipes_of_one_phase():
    json, _ = configure({"gradient_clipping": 0.0, "zero_optimization": dict(OFFLOAD)}, several_phases=False)
    assert json["zero_optimization"] == OFFLOAD
