from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from chorus.population.tokens import TokenSplit
from chorus.train.evaluate import likelihoods
from chorus.train.heldout import loss, mixture_loss
from chorus.train.loss import next_token_loss
from chorus.train.model import Llama
from chorus.train.run import Prepared, Run
from chorus.train.settings import Settings
from chorus.train.snapshot import load_saved, save_member

SETTINGS = Settings(corpus="stdlib", layers=2, width=64, heads=2, context_length=48)


def make_run(directory: Path) -> Run:
    prepared = Prepared(vocab_size=300, bos=0, eos=1, tokens={"train": 5_000}, documents={"train": 5})
    return Run(directory=directory, settings=SETTINGS, prepared=prepared)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Run, LlamaForCausalLM]:
    """A member with large weights, and the same read by Hugging Face in float32."""
    run = make_run(tmp_path)
    model = Llama(run.shape)
    model.initialise(torch.Generator().manual_seed(5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)), alpha=0.05)
    path = save_member(model, run, "t0-c00")
    original, report = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return run, original


def test_forward_and_gradients_equal_hugging_face(saved: tuple[Run, LlamaForCausalLM]) -> None:
    run, original = saved
    ours = load_saved(run, "t0-c00", torch.device("cpu")).requires_grad_(True)
    tokens = torch.randint(300, (3, 49), generator=torch.Generator().manual_seed(7))
    logits = ours(tokens[:, :-1]) @ ours.lm_head.weight.T
    theirs = original(tokens[:, :-1]).logits
    assert theirs.abs().max() > 1  # otherwise nothing could differ
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=2e-5)

    our_loss, _ = next_token_loss(ours(tokens[:, :-1]).flatten(0, 1), ours.lm_head.weight, tokens[:, 1:].flatten())
    their_loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), tokens[:, 1:].flatten())
    our_loss.backward()
    their_loss.backward()
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    gradients = dict(original.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_parameters_are_counted_from_the_shape_alone() -> None:
    shape = make_run(Path()).shape
    assert shape.num_parameters == sum(parameter.numel() for parameter in Llama(shape).parameters())


def test_likelihoods_of_windows_equal_hugging_face_document_by_document(saved: tuple[Run, LlamaForCausalLM]) -> None:
    run, original = saved
    generator = np.random.default_rng(8)
    split = TokenSplit.from_documents([generator.integers(300, size=size).tolist() for size in (30, 1, 130, 48, 49)])
    found = likelihoods(load_saved(run, "t0-c00", torch.device("cpu")), split, torch.device("cpu"))

    expected = []
    for _, start, stop in split.windows(48):
        tokens = torch.from_numpy(split.tokens[start:stop].astype(np.int64))[None]
        with torch.no_grad():
            p = torch.softmax(original(tokens).logits[0, :-1], -1)
        expected.append(p.gather(1, tokens[0, 1:, None])[:, 0].numpy())
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-3)
    assert len(found) == 29 + 0 + 129 + 47 + 48


def test_mixture_loss_averages_probabilities_not_losses() -> None:
    rows = [np.array([0.5, 0.1], dtype=np.float32), np.array([0.1, 0.3], dtype=np.float32)]
    assert loss(rows[0]) == pytest.approx(-(np.log(0.5) + np.log(0.1)) / 2)
    assert mixture_loss(rows) == pytest.approx(-(np.log(0.3) + np.log(0.2)) / 2)


def test_a_member_left_by_a_kill_is_replaced_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    model = Llama(run.shape)
    model.initialise(torch.Generator().manual_seed(1))
    path = save_member(model, run, "t0-c00")
    (path.with_name(".t0-c00.saving")).mkdir()
    model.initialise(torch.Generator().manual_seed(2))
    assert save_member(model, run, "t0-c00") == path
    again = load_saved(run, "t0-c00", torch.device("cpu"))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16().float())
    assert [entry.name for entry in path.parent.iterdir()] == ["t0-c00"]
