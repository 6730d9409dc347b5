import pytest
import torch
from conftest import assert_equal, tiny_autoencoder
from torch import nn

from letit_dist.recipes.base import OptimizerConfig, Recipe, RecipeConfig
from letit_dist.recipes.vqvae2 import VQVAE2Recipe, VQVAE2RecipeConfig
from letit_dist.schedule import average_beta
from letit_dist.training.ema import WeightAverage


class NetConfig(RecipeConfig):
    kind: str = "net"


class Net(Recipe):
    """One network that learns, with a buffer, and one that does not."""

    def __init__(self):
        super().__init__(NetConfig(optimizer=OptimizerConfig(learning_rate=1.0)), seed=0, precision="fp64")
        self.net = nn.BatchNorm1d(3).double()
        self.frozen = (self.add_companion(nn.Linear(3, 3).double()),)
        self.counter = {"calls": 0}


def set_weights(recipe, number):
    draws = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in recipe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64))
        recipe.net.running_mean.fill_(number)
        recipe.net.num_batches_tracked.fill_(number)


@pytest.mark.parametrize("warmup", [0.0, 0.05])
def test_the_average_is_its_closed_form(warmup):
    recipe = Net()
    set_weights(recipe, 0)
    average = WeightAverage(recipe, half_life=500.0, warmup=warmup)
    values, betas = [recipe.net.weight.detach().clone()], []
    for number in range(1, 30):
        set_weights(recipe, number)
        values.append(recipe.net.weight.detach().clone())
        betas.append(average_beta(500.0, 64, 64 * number, warmup))
        average.update(recipe, 64, 64 * number)
    # Weight of the start: the product of all betas; of batch i: (1 - beta_i) x the product of those after it.
    expected = values[0] * torch.tensor(betas, dtype=torch.float64).prod()
    for i, value in enumerate(values[1:]):
        expected = expected + value * (1 - betas[i]) * torch.tensor(betas[i + 1 :], dtype=torch.float64).prod()
    torch.testing.assert_close(average.module.net.weight.detach(), expected, atol=1e-13, rtol=0)
    assert (0 < betas[0] < 1e-5) == (warmup > 0) and betas[-1] < 1


def test_buffers_are_copied():
    recipe = Net()
    average = WeightAverage(recipe, half_life=1e9, warmup=0)
    set_weights(recipe, 7)
    average.update(recipe, 64, 64)
    assert torch.equal(average.module.net.running_mean, torch.full((3,), 7.0, dtype=torch.float64))
    assert average.module.net.num_batches_tracked == 7
    assert not torch.equal(average.module.net.weight, recipe.net.weight)


def test_a_buffer_that_was_replaced_is_found():
    recipe = Net()
    average = WeightAverage(recipe, half_life=1e9, warmup=0)
    recipe.net.running_mean = torch.full((3,), 5.0, dtype=torch.float64)
    average.update(recipe, 64, 64)
    assert torch.equal(average.module.net.running_mean, recipe.net.running_mean)
    assert average.module.net.running_mean is not recipe.net.running_mean


def test_the_first_update_averages_as_well():
    recipe = Net()
    set_weights(recipe, 0)
    average = WeightAverage(recipe, half_life=64.0, warmup=0)
    start = recipe.net.weight.detach().clone()
    set_weights(recipe, 1)
    average.update(recipe, 64, 64)
    torch.testing.assert_close(average.module.net.weight.detach(), (start + recipe.net.weight.detach()) / 2)


def test_companions_are_shared_and_everything_else_is_a_copy():
    recipe = Net()
    twin = WeightAverage(recipe, half_life=1.0, warmup=0).module
    assert type(twin) is Net and twin.companions[0] is recipe.companions[0] is twin.frozen[0]
    assert twin.net is not recipe.net and twin.net.weight.data_ptr() != recipe.net.weight.data_ptr()
    twin.counter["calls"] += 1
    assert recipe.counter["calls"] == 0
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad for parameter in recipe.net.parameters())
    assert sorted(twin.state_dict()) == sorted(recipe.state_dict()) and not any(
        "frozen" in n for n in twin.state_dict()
    )
    assert not recipe.companions[0].training and not recipe.companions[0].weight.requires_grad


def test_codebooks_of_an_average_are_those_of_the_weights():
    config = VQVAE2RecipeConfig(optimizer=OptimizerConfig(learning_rate=1e-3))
    recipe = VQVAE2Recipe(config, tiny_autoencoder(), seed=0, precision="fp32")
    average = WeightAverage(recipe, half_life=1e9, warmup=0)
    start = {name: value.clone() for name, value in average.module.named_parameters()}
    recipe.autoencoder.forward_training(torch.rand(2, 3, 32, 32))
    recipe.autoencoder.update_codebooks()
    average.update(recipe, 8, 8)
    assert_equal(dict(average.module.named_buffers()), dict(recipe.named_buffers()))
    assert average.module.autoencoder.top_quantizer.updates == 1
    assert_equal(dict(average.module.named_parameters()), start)
