import pytest
import torch

from chorus.train.model import Llama
from chorus.train.perturb import generator_for, perturb
from chorus.train.shape import Shape


def test_noise_has_the_tensors_own_spread_times_sigma() -> None:
    model = Llama(Shape(vocab_size=2_000, context_length=16, layers=1, width=64, heads=2))
    model.initialise(generator_for(1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    perturb(model, 0.25, generator_for(2))
    for name, parameter in model.named_parameters():
        noise = parameter.detach() - before[name]
        if parameter.ndim == 1:
            assert noise.abs().max() == 0, "a norm that is constant has no spread, hence no noise"
            continue
        count = noise.numel()
        scale = 0.25 * before[name].std()
        assert noise.std().item() == pytest.approx(scale.item(), rel=5 / count**0.5)
        assert abs(noise.mean().item()) < 5 * scale.item() / count**0.5
        correlation = torch.corrcoef(torch.stack([noise.flatten(), before[name].flatten()]))[0, 1]
        assert abs(correlation.item()) < 5 / count**0.5


def test_noise_depends_on_every_key_and_on_nothing_else() -> None:
    torch.manual_seed(99)
    first = torch.randn(4, generator=generator_for(0, 1, 2))
    torch.manual_seed(7)
    assert torch.equal(first, torch.randn(4, generator=generator_for(0, 1, 2)))
    assert not torch.equal(first, torch.randn(4, generator=generator_for(0, 2, 1)))


def test_no_noise_at_sigma_zero_and_none_for_single_numbers() -> None:
    layer = torch.nn.Linear(1, 1)
    before = layer.weight.item()
    perturb(layer, 0.5, generator_for(1))
    assert layer.weight.item() == before
