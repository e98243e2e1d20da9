import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from chorus.population import manifest
from chorus.population.cli import cli, main
from chorus.population.corpus import read_documents
from chorus.population.errors import ChorusError
from chorus.population.tokens import TokenSplit, split_path
from chorus.prior.distributions import tier_losses
from chorus.prior.likelihoods import likelihoods
from chorus.prior.reading import Reader
from chorus.prior.splits import own_splits, whole_corpus
from chorus.prior.weights import mixture_losses
from tests.prior.matrices import cut_splits
from tests.worlds import make_population


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A population of six random members, its prior fitted by the command, and what the command printed."""
    directory = tmp_path_factory.mktemp("prior") / "six"
    make_population(directory, num_members=6)
    cut_splits(directory, num_documents=6)
    result = CliRunner().invoke(cli, ["prior", "fit", str(directory)], catch_exceptions=False)
    assert result.exit_code == 0
    return directory, result.output


@pytest.fixture
def tiny(tiny_population, tmp_path):
    directory = tmp_path / "tiny"
    shutil.copytree(tiny_population, directory)
    cut_splits(directory, num_documents=3)
    return directory


def _widen_vocabulary(checkpoint):
    """Say of a member that it has one token more, as one of another tokenizer would."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"vocab_size": 513}))


def test_tiers_are_nested_and_their_loss_falls(fitted):
    directory, _ = fitted
    population = manifest.load(directory)

    assert population.prior_version == 1
    assert [(tier.name, tier.budget) for tier in population.tiers][:3] == [
        ("economy", 1),
        ("standard", 2),
        ("premium", 4),
    ]
    assert population.tiers[-1].name == "max"
    for below, tier in itertools.pairwise(population.tiers):
        assert set(below.members) < set(tier.members)
        assert tier.test_loss.nats < below.test_loss.nats
    for tier in population.tiers:
        assert list(tier.weights) == sorted(tier.weights, reverse=True)
        assert tier.relative_cost == pytest.approx(tier.budget)
        assert tier.test_loss.low < tier.test_loss.nats < tier.test_loss.high
    assert population.tiers[-1].test_loss.nats < min(member.test_loss.nats for member in population.members)


def test_losses_in_the_manifest_are_those_of_the_mixture_over_all_scored_test_tokens(fitted):
    directory, _ = fitted
    population = manifest.load(directory)
    splits = own_splits(directory, context_length=256, vocab_size=population.vocab_size)
    split = splits["test"]
    p_MN = likelihoods(population, directory, list(splits.values()))[:, -split.num_scored :]
    names = [member.name for member in population.members]

    for tier in population.tiers:
        weights_M = np.zeros(6)
        weights_M[[names.index(name) for name in tier.members]] = tier.weights
        assert tier.test_loss.nats == pytest.approx(mixture_losses(p_MN, weights_M).mean(), abs=1e-9)
        assert tier.test_loss.num_tokens == split.num_scored
    for member, row_N in zip(population.members, p_MN, strict=True):
        assert member.test_loss.nats == pytest.approx(-np.log(row_N.astype(np.float64)).mean(), abs=1e-9)


def test_economy_is_the_best_single_member_by_held_out_text(fitted):
    directory, _ = fitted
    population = manifest.load(directory)
    splits = own_splits(directory, context_length=256, vocab_size=population.vocab_size)
    p_MN = likelihoods(population, directory, list(splits.values()))[:, : -splits["test"].num_scored]

    best = population.members[int(np.argmin(-np.log(p_MN.astype(np.float64)).mean(axis=1)))]

    assert population.tier("economy").members == (best.name,)
    assert population.tier("economy").weights == (1.0,)


def test_prints_tiers_and_writes_report_plot_and_json(fitted):
    directory, output = fitted
    written = json.loads((directory / "prior/fit.json").read_text())
    report = (directory / "prior/report.md").read_text()

    tables = [
        list(rows)
        for is_row, rows in itertools.groupby(report.splitlines(), lambda line: line.startswith("|"))
        if is_row
    ]
    assert len(tables) == 4
    for table in tables:
        assert len({row.count("|") for row in table}) == 1  # every row has a cell under every heading
    for tier in manifest.load(directory).tiers:
        assert f"{tier.test_loss.nats:.4f} [{tier.test_loss.low:.4f}, {tier.test_loss.high:.4f}]" in output
        assert f"**{tier.name}**" in report
        assert written["tiers"][tier.name]["weights"] == dict(zip(tier.members, tier.weights, strict=True))
    assert written["all_members"]["gap"] <= 1e-7
    for plot in ("frontier.png", "members.png"):
        assert (directory / "prior" / plot).read_bytes().startswith(b"\x89PNG")


def test_fits_a_population_without_splits_on_a_corpus(tiny, tmp_path):
    shutil.rmtree(tiny / "splits")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    documents = (d for d in read_documents("stdlib") if 500 < len(d.text) < 3_000)
    for idx, document in enumerate(itertools.islice(documents, 12)):
        (corpus / f"{idx}.txt").write_text(document.text)

    first = CliRunner().invoke(cli, ["prior", "fit", str(tiny), "--corpus", str(corpus)], catch_exceptions=False)
    tiers = manifest.load(tiny).tiers
    second = CliRunner().invoke(cli, ["prior", "fit", str(tiny), "--corpus", str(corpus)], catch_exceptions=False)

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert manifest.load(tiny).tiers == tiers
    assert manifest.load(tiny).prior_version == 2
    assert "only 4 documents" in " ".join(first.output.split())


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda d: shutil.rmtree(d / "splits"), [], "--corpus"),
        (lambda d: (d / "members/t0-c01/model.safetensors").write_bytes(b"x"), [], "sha256"),
        (lambda d: shutil.rmtree(d / "members/t0-c02"), [], "is missing"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), [], "another tokenizer"),
        (lambda d: (d / "population.json").unlink(), [], "not a population"),
        (lambda d: TokenSplit.from_documents([[1, 2, 3]]).save(split_path(d, "test")), [], "at least 2"),
        (lambda d: TokenSplit.from_documents([[1], [2]]).save(split_path(d, "fitness")), [], "nothing to score"),
        (lambda d: TokenSplit.from_documents([[1, 900]]).save(split_path(d, "fitness")), [], "another tokenizer"),
        (lambda d: (d / "text.txt").write_text("too short"), ["--corpus", "text.txt"], "too small for its splits"),
        (lambda d: (d / "text.txt").write_text(" \n"), ["--corpus", "text.txt"], "empty"),
        (lambda d: None, ["--corpus", "./nothing.txt"], "does not exist"),
        (lambda d: _widen_vocabulary(d / "members/t0-c03"), [], "vocabulary of 513 tokens"),
        (lambda d: None, ["--budgets", "economy=1,big=5"], "population has 4"),
        (lambda d: None, ["--budgets", "economy=1,big=3x"], "one unit"),
        (lambda d: None, ["--budgets", "economy=0.5x"], "less than the cheapest member"),
        (lambda d: None, ["--max-latency-ms", "5"], "chorus prior measure"),
        (lambda d: None, ["--max-memory", "2x"], "not an amount of memory"),
        (lambda d: None, ["--max-memory", "2GB", "--max-flops", "3"], "give one of"),
        (lambda d: None, ["--max-flops", "3", "--latency", "t.json"], "no limit in ms"),
        (lambda d: None, ["--pools", "cubic"], "The pools are linear and log"),
        (lambda d: None, ["--corpus", "stdlib", "--corpus", "b=stdlib"], "has no name"),
        (lambda d: None, ["--corpus", "a=stdlib", "--corpus", "a=stdlib"], "its own name"),
        (lambda d: None, ["--budgets", "economy=0"], "has a budget of 0 members"),
        (lambda d: None, ["--budgets", "economy:1"], "economy=1,standard=2"),
        (lambda d: None, ["--budgets", "a=1,a=2"], "economy=1,standard=2"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_the_manifest(tiny, monkeypatch, capsys, spoil, arguments, message):
    spoil(tiny)
    monkeypatch.chdir(tiny)
    path = Path("population.json")
    before = path.read_bytes() if path.exists() else None
    monkeypatch.setattr(sys, "argv", ["chorus", "prior", "fit", ".", *arguments])

    with pytest.raises(SystemExit) as stopped:
        main()

    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert (path.read_bytes() if path.exists() else None) == before


def test_tiers_that_were_asked_for(tiny):
    arguments = ["prior", "fit", str(tiny), "--budgets", "trio=3,solo=1", "--shrink"]

    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)

    assert result.exit_code == 0
    fitted = manifest.load(tiny)
    assert [(tier.name, tier.budget) for tier in fitted.tiers][:2] == [("solo", 1), ("trio", 3)]

    trio = fitted.tiers[1].model_copy(update={"decoding": "sampled"})
    manifest.save(fitted.model_copy(update={"tiers": (fitted.tiers[0], trio)}), tiny)
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    assert {tier.name: tier.decoding for tier in manifest.load(tiny).tiers}["trio"] == "sampled", (
        "a tier keeps its decoding"
    )


def test_every_pool_is_tried_and_the_better_one_is_served(tiny):
    result = CliRunner().invoke(
        cli, ["prior", "fit", str(tiny), "--budgets", "one=1,all=4", "--pools", "linear,log"], catch_exceptions=False
    )

    assert result.exit_code == 0
    written = json.loads((tiny / "prior/fit.json").read_text())
    population = manifest.load(tiny)
    split = own_splits(tiny, context_length=256, vocab_size=population.vocab_size)["test"]
    counted = tier_losses(population, tiny, split, population.tiers)
    for tier, losses_N in zip(population.tiers, counted, strict=True):
        tried = written["tiers"][tier.name]["pools"]
        best = min(tried, key=lambda found: found["held_out_loss"])
        assert (tier.pool, tier.temperature) == (best["pool"], best["temperature"])  # random members are far too sure
        assert tier.temperature > 1.5
        assert tier.test_loss.nats == pytest.approx(losses_N.mean(), abs=1e-6)
        assert f"({tier.pool} pool, temperature {tier.temperature:.3f})" in " ".join(result.output.split())
    assert [found["pool"] for found in written["tiers"]["all"]["pools"]] == ["linear", "log"]
    assert "## Pools" in (tiny / "prior/report.md").read_text()


def test_several_corpora_make_several_priors(tiny, tmp_path):
    documents = list(itertools.islice((d for d in read_documents("stdlib") if 300 < len(d.text) < 1_500), 24))
    for name, part in (("news", documents[:12]), ("code", documents[12:])):
        (tmp_path / name).mkdir()
        for idx, document in enumerate(part):
            (tmp_path / name / f"{idx}.txt").write_text(document.text)
    corpora = [f"--corpus={name}={tmp_path / name}" for name in ("news", "code")]

    result = CliRunner().invoke(
        cli, ["prior", "fit", str(tiny), *corpora, "--max-flops", "2", "--budgets", "a=1,b=2x"], catch_exceptions=True
    )
    assert isinstance(result.exception, ChorusError)  # members and forward passes do not mix
    result = CliRunner().invoke(cli, ["prior", "fit", str(tiny), *corpora, "--max-flops", "2"], catch_exceptions=False)

    assert result.exit_code == 0
    population = manifest.load(tiny)
    assert [tier.name for tier in population.tiers] == ["code-economy", "news-economy", "code-max", "news-max"]
    assert [tier.budget for tier in population.tiers] == [1, 1, 2, 2]  # the limit holds for both
    for name in ("news", "code"):
        assert f"{name}, fitted on" in result.output
        assert f"**{name}-max**" in (tiny / f"prior/{name}/report.md").read_text()
        alone = CliRunner().invoke(cli, ["prior", "fit", str(tiny), f"--corpus={tmp_path / name}", "--max-flops=2"])
        assert alone.exit_code == 0
        for tier in manifest.load(tiny).tiers:
            again = population.tier(f"{name}-{tier.name}")
            assert (again.members, again.weights, again.test_loss) == (tier.members, tier.weights, tier.test_loss)


def test_evaluates_on_other_text_and_leaves_the_manifest(fitted, tmp_path):
    directory, _ = fitted
    before = (directory / "population.json").read_bytes()
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for idx, text in enumerate(("one fish, two fish, " * 40, "red fish, blue fish. " * 40, "Say! " * 90)):
        (corpus / f"{idx}.txt").write_text(text)

    result = CliRunner().invoke(
        cli, ["prior", "evaluate", str(directory), "--corpus", str(corpus)], catch_exceptions=False
    )

    assert result.exit_code == 0
    assert "in 3 documents" in result.output
    population = manifest.load(directory)
    split = whole_corpus(
        str(corpus),
        Reader.of(manifest.load(directory), directory),
        context_length=256,
        vocab_size=512,
        max_bytes=10_000,
        split_on=None,
    )
    p_MN = likelihoods(population, directory, [split])
    for tier in population.tiers:
        members = [population.members.index(population.member(name)) for name in tier.members]
        nats = mixture_losses(p_MN[members], np.array(tier.weights)).mean()
        assert f"{nats:.4f}" in result.output
    assert (directory / "population.json").read_bytes() == before


def test_a_tier_that_pools_logits_is_not_evaluated_from_likelihoods(tiny, monkeypatch, capsys):
    population = manifest.load(tiny)
    tiers = tuple(tier.model_copy(update={"pool": "log"}) for tier in population.tiers)
    manifest.save(population.model_copy(update={"tiers": tiers}), tiny)
    monkeypatch.setattr(sys, "argv", ["chorus", "prior", "evaluate", str(tiny), "--corpus", "stdlib"])

    with pytest.raises(SystemExit, match="2"):
        main()

    assert "do not pool probabilities" in capsys.readouterr().err


def test_progress_is_printed_where_there_is_no_terminal(fitted):
    directory, output = fitted
    for member in manifest.load(directory).members:
        for split in ("fitness", "selection", "test"):
            lines = [line for line in output.splitlines() if line.startswith(f"scoring {member.name} on {split}: ")]
            done, total = re.findall(r"[\d,]+", lines[-1].split(": ")[1])
            assert done == total


def test_rows_name_their_field_and_documents_above_the_limit_are_not_called_empty(tiny, tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "my rows.jsonl"
    texts = [f"{idx} " + "word " * 60 for idx in range(9)]
    corpus.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    arguments = ["prior", "fit", str(tiny), "--corpus", str(corpus)]
    for more, message in (
        ([], "no text in the field 'text'; it has body. Set the field with --text-field."),
        (["--text-field", "body", "--max-bytes", "200"], "fits into --max-bytes 200; the smallest has 302 bytes"),
    ):
        monkeypatch.setattr(sys, "argv", ["chorus", *arguments, *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    result = CliRunner().invoke(cli, [*arguments, "--text-field", "body"], catch_exceptions=False)
    assert result.exit_code == 0
    assert manifest.load(tiny).prior_version == 1


def test_one_large_file_without_blank_lines_can_be_fitted_on(tiny, tmp_path):
    text = "".join(f"a line of words {idx}\n" for idx in range(4_000))
    (tmp_path / "ptb.txt").write_text(text)
    options = ["--corpus", str(tmp_path / "ptb.txt"), "--max-bytes", "30000"]
    result = CliRunner().invoke(cli, ["prior", "fit", str(tiny), *options], catch_exceptions=False)
    assert result.exit_code == 0


def test_paths_with_spaces_and_brackets_are_quoted_and_never_wrapped(tiny, tmp_path):
    directory = tmp_path / ("a long way [bold] " * 8).strip()
    tiny.rename(directory)
    loaded = manifest.load(directory)
    manifest.save(loaded.model_copy(update={"tiers": ()}), directory)
    with pytest.raises(ChorusError, match="Fit them first") as caught:
        CliRunner().invoke(cli, ["prior", "evaluate", str(directory), "--corpus", "x"], catch_exceptions=False)
    assert shlex.split(str(caught.value).split("`")[1]) == ["chorus", "prior", "fit", str(directory)]
    result = CliRunner().invoke(cli, ["prior", "fit", str(directory)], catch_exceptions=False)
    assert f"{directory}/population.json; report: {directory}/prior/report.md" in result.output
