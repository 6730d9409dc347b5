import pytest
import torch
from conftest import assert_equal, tiny_autoencoder
from pydantic import ValidationError
from torch import nn

from letit_dist.errors import UserError
from letit_dist.recipes.base import OptimizerConfig, ParameterGroup, child_groups
from letit_dist.training.optim import (
    activate,
    build_optimizer,
    forget_gradients,
    load_state_tensors,
    move,
    require_gradients,
    state_tensors,
)


class Two(nn.Module):
    """Two children; one parameter is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.buffers_only = nn.Linear(3, 2), nn.Linear(2, 1), nn.BatchNorm1d(2, affine=False)
        self.b.bias.requires_grad_(False)

    def forward(self, x):
        return self.b(self.a(x)).square().mean()


FIRST, SECOND, BOTH = {"a"}, {"b"}, {"a", "b"}


def learn(module, optimizer, names, rate, steps=1, seed=0):
    for step in range(steps):
        activate(optimizer, names, rate)
        forget_gradients(optimizer)
        module(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed + step))).backward()
        move(optimizer)


def weights(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def build(**config):
    module = Two()
    return module, build_optimizer(child_groups(module), OptimizerConfig(**{"learning_rate": 0.1, **config}))


def test_there_is_one_group_a_network_of_what_can_learn():
    _, optimizer = build(betas=(0.5, 0.9), eps=1e-4)
    assert [group["name"] for group in optimizer.param_groups] == ["a", "b"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.9) and optimizer.param_groups[1]["eps"] == 1e-4


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_only_the_networks_of_the_phase_move_and_only_their_state(kind):
    module, optimizer = build(kind=kind)
    learn(module, optimizer, BOTH, 0.1, steps=2)
    before, state = weights(module), {n: t.clone() for n, t in state_tensors(optimizer, module).items()}
    learn(module, optimizer, SECOND, 0.1, seed=9)
    after, state_after = weights(module), state_tensors(optimizer, module)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"b.weight"}
    moved = {name for name in state if not torch.equal(state[name], state_after[name])}
    slots = ["step", "exp_avg", "exp_avg_sq"] if kind == "adam" else []
    assert moved == {f"{slot}/b.weight" for slot in slots}
    assert len(optimizer.param_groups) == 2


def test_the_rate_is_the_one_that_was_set():
    module, optimizer = build(kind="sgd")
    start = weights(module)
    learn(module, optimizer, FIRST, 0.0)
    assert_equal(weights(module), start)
    learn(module, optimizer, FIRST, 0.25)
    expected = start["a.weight"] - 0.25 * module.a.weight.grad
    torch.testing.assert_close(module.a.weight.detach(), expected, rtol=0, atol=1e-7)


def test_a_group_moves_at_its_own_multiple_of_the_rate():
    module = Two()
    groups = [ParameterGroup("w", (module.a.weight,), 0.5), ParameterGroup("w", (module.a.bias,), 2.0)]
    optimizer = build_optimizer(groups, OptimizerConfig(kind="sgd", learning_rate=0.1))
    start = weights(module)
    learn(module, optimizer, {"w"}, 0.1)
    for name, rate in (("weight", 0.05), ("bias", 0.2)):
        expected = start[f"a.{name}"] - rate * getattr(module.a, name).grad
        torch.testing.assert_close(weights(module)[f"a.{name}"], expected, rtol=0, atol=1e-7)


def test_gradients_are_asked_for_where_they_are_needed():
    module = Two()
    groups = child_groups(module)
    require_gradients(groups, FIRST)
    assert module.a.weight.requires_grad and not module.b.weight.requires_grad
    require_gradients(groups, SECOND)
    assert module.b.weight.requires_grad and not module.a.bias.requires_grad
    assert not module.b.bias.requires_grad  # it was frozen, and is in no group


def test_adam_is_torchs_adam():
    module, optimizer = build(betas=(0.5, 0.9), eps=1e-4)
    learn(module, optimizer, BOTH, 0.01, steps=5)
    twin = Two()
    plain = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=0.01, betas=(0.5, 0.9), eps=1e-4)
    for step in range(5):
        plain.zero_grad()
        twin(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).backward()
        plain.step()
    for name, value in weights(twin).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("without", [None, "a.bias"])
def test_a_move_is_a_step(without):
    """Also with a parameter that the loss does not always reach: its count of steps begins late, or stands still."""
    twins = [build(betas=(0.5, 0.9), eps=1e-4) for _ in range(2)]
    for number in range(4):
        for (module, optimizer), go in zip(twins, (move, lambda optimizer: optimizer.step()), strict=True):
            activate(optimizer, SECOND if number == 2 else BOTH, 0.1 / (1 + number))
            forget_gradients(optimizer)
            assert all(parameter.grad is None for parameter in module.parameters())
            module(torch.randn(8, 3, generator=torch.Generator().manual_seed(number))).backward()
            if without and number % 2 == 0:
                dict(module.named_parameters())[without].grad = None
            go(optimizer)
    (module, optimizer), (plain, stepped) = twins
    assert_equal(weights(module), weights(plain))
    found = state_tensors(optimizer, module)
    assert_equal(found, state_tensors(stepped, plain))
    assert found["step/b.weight"] == 4 and found["step/a.bias"] == (2 if without else 3)


def test_an_error_in_a_step_leaves_all_groups_in_place():
    _, optimizer = build()
    activate(optimizer, FIRST, 0.1)

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fail)
    assert [group["name"] for group in optimizer.param_groups] == ["a", "b"]


def test_the_state_makes_a_round_trip():
    module, optimizer = build()
    learn(module, optimizer, BOTH, 0.1, steps=2)
    learn(module, optimizer, FIRST, 0.1, seed=5)
    saved = {name: value.clone() for name, value in state_tensors(optimizer, module).items()}
    assert set(saved) == {
        f"{slot}/{name}" for slot in ("step", "exp_avg", "exp_avg_sq") for name in ("a.weight", "a.bias", "b.weight")
    }
    assert saved["step/a.bias"] == 3 and saved["step/b.weight"] == 2

    twin, other = build()
    twin.load_state_dict(module.state_dict())
    learn(twin, other, BOTH, 0.0)  # state that must not survive
    load_state_tensors(other, twin, saved, "here")
    assert_equal(state_tensors(other, twin), saved)
    # What was not saved is not kept from before either.
    load_state_tensors(other, twin, {key: value for key, value in saved.items() if "/a." in key}, "here")
    assert not any("/b." in key for key in state_tensors(other, twin))
    load_state_tensors(other, twin, saved, "here")
    for pair in ((module, optimizer), (twin, other)):
        learn(*pair, BOTH, 0.1, steps=2, seed=20)
    assert_equal(weights(twin), weights(module))


def test_state_takes_the_layout_of_its_parameter():
    model = nn.Module()
    model.net = tiny_autoencoder().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(child_groups(model), OptimizerConfig(learning_rate=0.1))
    name = "net.bottom_encoder.convs.0.weight"
    parameter = dict(model.named_parameters())[name]
    load_state_tensors(
        optimizer, model, {f"exp_avg/{name}": torch.ones(parameter.shape), f"step/{name}": torch.tensor(2.0)}, ""
    )
    assert optimizer.state[parameter]["exp_avg"].stride() == parameter.stride() != torch.ones(parameter.shape).stride()


def test_state_of_other_parameters_is_refused():
    module, optimizer = build()
    with pytest.raises(UserError, match=r"^here: optimiser state for 'c.weight', which this recipe does not have"):
        load_state_tensors(optimizer, module, {"exp_avg/c.weight": torch.zeros(1)}, "here")
    with pytest.raises(UserError, match=r"^here: exp_avg/a.weight is \(3, 2\), the parameter \(2, 3\)"):
        load_state_tensors(optimizer, module, {"exp_avg/a.weight": torch.zeros(3, 2)}, "here")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "sgd", "betas": (0.5, 0.9)}, "betas and eps have no effect with kind sgd"),
        ({"kind": "sgd", "eps": 1e-3}, "betas and eps have no effect with kind sgd"),
        ({"decay": (10, 10)}, "decay needs 0 <= first < second"),
        ({"decay": (-1, 10)}, "decay needs 0 <= first < second"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
        ({"learning_rate": 0.0}, "greater than 0"),
        ({"momentum": 0.9}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        OptimizerConfig(**{"learning_rate": 0.1, **config})


def test_a_resolved_sgd_config_is_accepted_again():
    config = OptimizerConfig(kind="sgd", learning_rate=0.1)
    assert OptimizerConfig(**config.model_dump()) == config
    assert OptimizerConfig(learning_rate=2.0, warmup=100, decay=(0, 200)).rate_at(99) == pytest.approx(
        2.0 * 0.5 * (1 + 0.015707317311820675)
    )
