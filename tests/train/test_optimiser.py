import pytest
import torch
from torch import Tensor, nn

from chorus.train import optimiser as module
from chorus.train.model import Llama
from chorus.train.optimiser import Optimiser, OptimiserName, clip_gradients, orthogonalise
from chorus.train.shape import Shape

SHAPE = Shape(vocab_size=300, context_length=16, layers=2, width=32, heads=1)


def small_model(seed: int) -> Llama:
    model = Llama(SHAPE)
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_equals_that_of_pytorch() -> None:
    ours, theirs = small_model(0), small_model(0)
    optimiser = Optimiser(ours, "adamw")
    reference = torch.optim.AdamW(theirs.parameters(), lr=1.0, betas=(0.9, 0.95))
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        rate, decay = 1e-2 / (step + 1), 0.1 * step
        for group in reference.param_groups:
            group["lr"], group["weight_decay"] = rate, decay
        optimiser.step(learning_rate=rate, weight_decay=decay)
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(48, 80), (80, 48), (64, 64)])
def test_orthogonalise_keeps_singular_vectors_and_evens_singular_values(size: tuple[int, int]) -> None:
    stack = torch.randn(3, *size, generator=torch.Generator().manual_seed(3))
    found = orthogonalise(stack)
    for before, after in zip(stack, found, strict=True):
        u, _, vt = torch.linalg.svd(before, full_matrices=False)
        core: Tensor = u.T @ after @ vt.T  # diagonal where the singular vectors are kept
        values = core.diagonal()
        # Jordan's coefficients let values settle between about 0.7 and 1.2; the smallest of a square matrix lag behind.
        assert values.median().item() == pytest.approx(0.95, abs=0.25)
        assert values.max() < 1.3
        torch.testing.assert_close(core, torch.diag(values), rtol=0, atol=1e-3)


def test_muon_updates_matrices_with_the_size_of_an_adamw_update_and_decays_them() -> None:
    model = small_model(0)
    name = "model.layers.0.mlp.up_proj.weight"
    before = dict(model.named_parameters())[name].detach().clone()
    optimiser = Optimiser(model, "muon")
    set_gradients(model, 1)
    optimiser.step(learning_rate=0.01, weight_decay=2.0)
    update = (before * (1 - 0.01 * 2.0) - dict(model.named_parameters())[name].detach()) / 0.01
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_muon_equals_that_of_pytorch_in_the_same_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = small_model(0).double(), small_model(0).double()
    optimiser = Optimiser(ours, "muon")
    matrices = [p for n, p in theirs.named_parameters() if ".layers." in n and p.ndim == 2]
    reference = torch.optim.Muon(matrices, lr=1.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    # Both iterate in a precision of their own, bfloat16 and float32. In float64 nothing but the formulas is left to differ.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.double().clone())
    monkeypatch.setattr(module, "_CPU_PRECISION", torch.float64)
    for step in range(4):
        for model in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        rate, decay = 1e-2 / (step + 1), 0.1 * step
        for group in reference.param_groups:
            group["lr"], group["weight_decay"] = rate, decay
        optimiser.step(learning_rate=rate, weight_decay=decay)
        reference.step()
    moved = 0.0
    start = dict(small_model(0).named_parameters())
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if any(other is matrix for matrix in matrices):
            moved += (mine - start[name]).abs().sum().item()
            # Each norm is kept from zero in its own way, by less than 1e-7 of it.
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)
    assert moved > 10


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_cautious_decay_shrinks_only_what_the_update_pulls_towards_zero(name: OptimiserName) -> None:
    models = [small_model(0) for _ in range(3)]
    decays = (0.0, 2.0, 2.0)  # none, everywhere, cautious
    for model, decay, cautious in zip(models, decays, (False, False, True), strict=True):
        set_gradients(model, 1)
        Optimiser(model, name, cautious=cautious).step(learning_rate=0.01, weight_decay=decay)
    for before, none, full, some in zip(small_model(0).parameters(), *(m.parameters() for m in models), strict=True):
        agrees = (before - none) * before > 0
        assert 0.2 < agrees.float().mean() < 0.8 or before.ndim == 1
        torch.testing.assert_close(some, torch.where(agrees, full, none), rtol=0, atol=1e-6)


def test_embeddings_and_head_take_their_own_multiple_of_the_rate() -> None:
    plain, scaled = small_model(0), small_model(0)
    for model, multiple in ((plain, 1.0), (scaled, 0.25)):
        set_gradients(model, 1)
        Optimiser(model, "muon", embedding_rate=multiple).step(learning_rate=0.01, weight_decay=0.3)
    start = dict(small_model(0).named_parameters())
    for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        expected = 0.25 if name in ("model.embed_tokens.weight", "lm_head.weight") else 1.0
        torch.testing.assert_close(other - start[name], expected * (one - start[name]), rtol=1e-4, atol=1e-6)


def test_a_reset_optimiser_steps_as_a_new_one() -> None:
    used, fresh = small_model(0), small_model(0)
    first, second = Optimiser(used, "muon"), Optimiser(fresh, "muon")
    set_gradients(used, 1)
    first.step(learning_rate=0.01, weight_decay=0.1)
    first.reset()
    used.load_state_dict(fresh.state_dict())
    for model, optimiser in ((used, first), (fresh, second)):
        set_gradients(model, 2)
        optimiser.step(learning_rate=0.01, weight_decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip(used.parameters(), fresh.parameters(), strict=True))


def test_state_carried_over_gives_the_same_steps() -> None:
    model, copy = small_model(0), small_model(0)
    first, second = Optimiser(model, "muon"), Optimiser(copy, "muon")
    set_gradients(model, 1)
    first.step(learning_rate=0.01, weight_decay=0.1)
    copy.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    for each, optimiser in ((model, first), (copy, second)):
        set_gradients(each, 2)
        optimiser.step(learning_rate=0.01, weight_decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_clipping_scales_all_gradients_together_and_tells_their_norm() -> None:
    model = small_model(0)
    set_gradients(model, 1)
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert clip_gradients(model, 1.0) == pytest.approx(expected, rel=1e-5)
    assert clip_gradients(model, 1.0) == pytest.approx(1.0, rel=1e-4)
    assert clip_gradients(model, 5.0) == pytest.approx(1.0, rel=1e-4)
