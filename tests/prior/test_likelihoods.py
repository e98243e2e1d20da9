import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, OPTConfig

from chorus.population import assemble, manifest
from chorus.population.errors import ChorusError
from chorus.population.tokens import TokenSplit
from chorus.prior import likelihoods as rows_of
from chorus.prior.likelihoods import likelihoods, row_file
from chorus.prior.matrix import INDEX, ROWS
from chorus.prior.splits import ScoredSplit, own_splits
from tests.prior.matrices import cut_splits
from tests.worlds import save_member


@pytest.fixture
def world(tiny_population, tmp_path):
    directory = tmp_path / "tiny"
    shutil.copytree(tiny_population, directory)
    population = manifest.load(directory)
    cut_splits(directory, num_documents=3)
    splits = own_splits(directory, context_length=population.context_length, vocab_size=population.vocab_size)
    return directory, population, splits


def slowly(checkpoint, split, context_length):
    """Document by document, window by window, in float64."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    found = []
    for idx in range(split.num_documents):
        ids = torch.from_numpy(split.document(idx).astype(np.int64))
        for start in range(0, len(ids) - 1, context_length - 1):
            window = ids[start : start + context_length]
            with torch.no_grad():
                log_p = model(window[None]).logits[0].log_softmax(-1)
            found.append(log_p[:-1].gather(-1, window[1:, None])[:, 0].exp().numpy())
    return np.concatenate(found)


def test_equal_a_slow_reference_document_by_document(world):
    directory, population, splits = world
    split = splits["test"]
    few = split.split
    assert max(np.diff(few.offsets)) > population.context_length  # some document needs several windows

    p_MN = likelihoods(population, directory, [split])

    assert p_MN.dtype == np.float32
    assert p_MN.shape == (4, split.num_scored)
    for member, row_N in zip(population.members, p_MN, strict=True):
        slow_N = slowly(directory / member.path, few, population.context_length)
        np.testing.assert_allclose(np.log(row_N), np.log(slow_N), atol=2e-4)


ARCHITECTURES = {
    "llama": lambda: LlamaConfig(num_key_value_heads=1, **SHAPE),
    "gpt2": lambda: GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3),
    "gemma2": lambda: Gemma2Config(num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, **SHAPE),
    "granite": lambda: GraniteConfig(num_key_value_heads=1, logits_scaling=3.0, **SHAPE),
    "opt": lambda: OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                             max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.3),
}  # fmt: skip
SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_a_long_windows_logits_are_made_piece_by_piece(architecture, rows):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]()).eval()
    generator = np.random.default_rng(0)
    documents = [generator.integers(2, 300, size=size).tolist() for size in (2, 30, 40, 64, 100)]
    split = ScoredSplit(
        name="test",
        split=TokenSplit.from_documents(documents),
        context_length=64,
        is_scored=generator.random(sum(map(len, documents))) < 0.7,
    )
    made = []
    model.get_output_embeddings().register_forward_hook(lambda module, given, out: made.append(out.shape[:-1].numel()))

    found = list(rows_of.logits(model, split, rows=rows))

    assert sorted(np.concatenate([columns_R for columns_R, _, _ in found])) == list(range(split.num_scored))
    assert max(len(logits_RV) for _, _, logits_RV in found) <= rows
    assert max(made) <= max(rows, 3)  # but for a look at three tokens
    expected = {}  # of every scored token: itself, and what predicts it
    for start, stop in split.windows:
        ids = split.split.tokens[start:stop].astype(np.int64)
        with torch.no_grad():
            slow_TV = model(input_ids=torch.from_numpy(ids[None])).logits[0]
        expected |= {split.columns[start + idx]: (ids[idx], slow_TV[idx - 1]) for idx in range(1, len(ids))}
    for columns_R, targets_R, logits_RV in found:
        for column, target, logits_V in zip(columns_R, targets_R, logits_RV, strict=True):
            assert int(target) == expected[column][0]
            torch.testing.assert_close(logits_V, expected[column][1], atol=1e-4, rtol=1e-4)


def test_a_model_that_does_not_come_apart_gives_all_logits_at_once(world):
    directory, population, splits = world
    model = rows_of.load_model(directory / population.members[0].path, population)
    expected = [each[2] for each in rows_of.logits(model, splits["test"], rows=50)]
    model.get_decoder = lambda: model

    found = [each[2] for each in rows_of.logits(model, splits["test"], rows=50)]

    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_splits_lie_one_after_the_other(world):
    directory, population, splits = world

    both = likelihoods(population, directory, [splits["fitness"], splits["test"]])

    fitness = likelihoods(population, directory, [splits["fitness"]])
    np.testing.assert_array_equal(both[:, : splits["fitness"].num_scored], fitness)
    np.testing.assert_array_equal(
        both[:, splits["fitness"].num_scored :], likelihoods(population, directory, [splits["test"]])
    )


@pytest.fixture
def loaded(monkeypatch):
    """Which checkpoints were loaded to be computed with."""
    names = []
    real = rows_of.load_model
    monkeypatch.setattr(
        rows_of, "load_model", lambda path, population: names.append(path.name) or real(path, population)
    )
    return names


def test_a_second_run_computes_nothing_and_gives_the_same(world, loaded):
    directory, population, splits = world
    first = likelihoods(population, directory, [splits["test"]])
    loaded.clear()

    np.testing.assert_array_equal(likelihoods(population, directory, [splits["test"]]), first)

    assert loaded == []


def test_a_member_added_later_costs_only_itself(world, loaded):
    directory, population, splits = world
    likelihoods(population, directory, [splits["test"]])
    save_member(directory / "members" / "late", seed=9)
    late = assemble.describe_member(directory, "members/late", "late")
    loaded.clear()

    p_MN = likelihoods(
        population.model_copy(update={"members": (*population.members, late)}), directory, [splits["test"]]
    )

    assert loaded == ["late"]
    assert len(p_MN) == 5


def test_an_interrupted_run_resumes_at_the_member_it_had_reached(world, loaded):
    directory, population, splits = world

    def interrupt(member, split, scored, total):
        if member == population.members[2].name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        likelihoods(population, directory, [splits["test"]], progress=interrupt)
    loaded.clear()

    likelihoods(population, directory, [splits["test"]])

    assert loaded == [member.name for member in population.members[2:]]


def test_the_matrix_is_a_view_of_the_file_and_rows_know_their_documents(world):
    directory, population, splits = world
    parts = [splits["fitness"], splits["test"]]

    p_MN = likelihoods(population, directory, parts)

    assert isinstance(p_MN, np.memmap)
    assert not p_MN.flags.writeable
    kept = row_file(directory, parts)._directory
    assert (kept / ROWS).stat().st_size == p_MN.nbytes  # nothing is kept twice
    index = json.loads((kept / INDEX).read_text())
    assert [part["offsets"] for part in index["parts"]] == [split.offsets.tolist() for split in parts]


def test_members_in_another_order_find_their_rows(world, loaded):
    directory, population, splits = world
    first = likelihoods(population, directory, [splits["test"]])
    loaded.clear()
    order = [2, 0, 3]
    other = population.model_copy(update={"members": tuple(population.members[idx] for idx in order)})

    np.testing.assert_array_equal(likelihoods(other, directory, [splits["test"]]), first[order])

    assert loaded == []


@pytest.mark.parametrize(
    "wrong", ["bits", "cut short", "another text's rows", "another text's index", "no index", "missing"]
)
def test_a_file_of_another_population_or_text_is_computed_again(world, loaded, wrong):
    directory, population, splits = world
    first = np.array(likelihoods(population, directory, [splits["test"]]))
    likelihoods(population, directory, [splits["fitness"]])
    own, other = (row_file(directory, [splits[name]])._directory for name in ("test", "fitness"))
    computed = [member.name for member in population.members]
    if wrong == "bits":
        data = bytearray((own / ROWS).read_bytes())
        data[10] ^= 64
        (own / ROWS).write_bytes(data)
        computed = computed[:1]
    elif wrong == "cut short":
        (own / ROWS).write_bytes((own / ROWS).read_bytes()[:-100])
        computed = computed[-1:]
    elif wrong == "another text's rows":
        shutil.copy(other / ROWS, own / ROWS)
    elif wrong == "another text's index":
        shutil.copy(other / INDEX, own / INDEX)
    elif wrong == "no index":
        (own / INDEX).write_text("{")
    else:
        (own / ROWS).unlink()
    loaded.clear()

    np.testing.assert_array_equal(likelihoods(population, directory, [splits["test"]]), first)

    assert loaded == computed


def test_rows_of_other_weights_are_not_taken(world, loaded):
    directory, population, splits = world
    first = likelihoods(population, directory, [splits["test"]])
    save_member(directory / population.members[1].path, seed=77)
    changed = assemble.describe_member(directory, population.members[1].path, population.members[1].name)
    members = (population.members[0], changed, *population.members[2:])
    loaded.clear()

    again = likelihoods(population.model_copy(update={"members": members}), directory, [splits["test"]])

    assert loaded == [changed.name]
    np.testing.assert_array_equal(again[[0, 2, 3]], first[[0, 2, 3]])
    assert not np.allclose(again[1], first[1])


def test_the_digest_knows_tokens_documents_and_windows(world):
    _, _, splits = world
    split = splits["test"].split
    changed = split.tokens.copy()
    changed[3] += 1
    offsets = split.offsets.copy()
    offsets[1] += 1

    digests = {
        ScoredSplit(name="test", split=TokenSplit(tokens=t, offsets=o), context_length=length).digest
        for t, o, length in [
            (split.tokens, split.offsets, 256),
            (changed, split.offsets, 256),
            (split.tokens, offsets, 256),
            (split.tokens, split.offsets, 128),
        ]
    }

    assert len(digests) == 4


def test_a_member_with_damaged_numbers_is_named(world):
    directory, population, splits = world
    model = AutoModelForCausalLM.from_pretrained(directory / population.members[1].path)
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    model.save_pretrained(directory / population.members[1].path)

    with pytest.raises(ChorusError, match="'t0-c01' gives undefined"):
        likelihoods(population, directory, [splits["test"]])


def test_tokens_beyond_the_vocabulary_are_refused(world):
    directory, _, _ = world

    with pytest.raises(ChorusError, match="another tokenizer"):
        own_splits(directory, context_length=256, vocab_size=100)


def test_documents_of_one_token_have_nothing_to_score():
    split = ScoredSplit(name="test", split=TokenSplit.from_documents([[1], [1, 2, 3], [], [4, 5]]), context_length=256)
    assert split.offsets.tolist() == [0, 0, 2, 2, 3]

    with pytest.raises(ChorusError, match="nothing to score"):
        ScoredSplit(name="test", split=TokenSplit.from_documents([[1], [2]]), context_length=256)
