"""`dft diagnose` through the real command: every figure against the model's own full logits, or real gradients."""

import json

import numpy as np
import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit
from looking import diagnose, options, shares, train_rows, truth

from dft_lightning.__main__ import main
from dft_lightning.callbacks.token_probabilities import P_EDGES
from dft_lightning.models import WeightedLM
from dft_lightning.token_classes import CLASSES, class_of
from dft_lightning.weighting import DFT, Uniform

#: Log-probabilities of the float32 model are within some 1e-5 of float64's; what is made of them, to this.
CLOSE = 1e-4

OWN = '''"""Weightings of one's own."""

from dataclasses import dataclass

from dft_lightning.weighting import TokenWeighting


@dataclass(frozen=True)
class Above(TokenWeighting):
    """1 above the mean of the whole step."""

    scope = "step"

    def weights(self, tokens):
        return (tokens.p > tokens.p.mean()).to(tokens.logp.dtype)


@dataclass(frozen=True)
class MeanOne(TokenWeighting):
    """p, divided by the sum of the weights."""

    divisor = "weights"

    def weights(self, tokens):
        return tokens.p


@dataclass(frozen=True)
class Twice(TokenWeighting):
    """Another weighting, doubled."""

    of: TokenWeighting

    def weights(self, tokens):
        return 2 * self.of.weights(tokens)


@dataclass(frozen=True)
class Rewarded(TokenWeighting):
    needs = frozenset({"reward"})

    def weights(self, tokens):
        return tokens.need("reward")
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file with weightings in the working directory."""
    (tmp_path / "my_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="session")
def sharp(tmp_path_factory):
    """A tiny model that is sure of itself, rightly or not: probabilities from next to nothing to next to 1."""
    folder, model = tmp_path_factory.mktemp("models") / "sharp", tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def two_sources(tmp_path):
    """Rows of two sources; nine of the first and five of the second."""
    rows = [row | {"source": "first" if number < 9 else "second"} for number, row in enumerate(sums(14))]
    return write_jsonl(tmp_path / "two.jsonl", rows)


def test_probabilities_and_entropies_are_the_models_own(tmp_path, sharp, two_sources):
    found = diagnose(tmp_path, sharp, two_sources, "--gradient_rows", 0)
    exact = truth(sharp, train_rows(sharp, two_sources).train_rows)
    p = exact.tokens.p
    assert (
        np.abs(p[:, None].numpy() - np.array(P_EDGES[1:-1])).min() > 1e-7
    )  # none is so near an edge that float32 decides
    counts = np.histogram(p.numpy(), P_EDGES)[0].tolist()
    assert found["p"]["counts"] == counts
    assert found["tokens"] == len(p) == sum(counts)
    assert found["signs"]["nll"] == pytest.approx(float(-exact.tokens.logp.mean()), abs=CLOSE)
    assert found["signs"]["entropy"] == pytest.approx(float(exact.tokens.entropy.mean()), abs=CLOSE)
    assert found["signs"]["unexpected"] == pytest.approx(float((p < 0.01).double().mean()))
    assert found["signs"]["open"] == pytest.approx(float(((p >= 0.1) & (p < 0.9)).double().mean()))
    entropies = torch.bincount((exact.tokens.entropy / 0.5).long(), minlength=24).tolist()
    assert found["entropy"]["counts"] == entropies


def test_shares_of_the_gradient_are_those_of_autograd_by_the_logits(tmp_path, sharp, two_sources):
    found = diagnose(tmp_path, sharp, two_sources, "--gradient_rows", 0, "--weightings", "Uniform", "DFT")
    module = train_rows(sharp, two_sources)
    exact = truth(sharp, module.train_rows)
    tokens = exact.tokens
    classes = class_of(module.tokenizer).long()[tokens.target]
    present = classes.unique().tolist()
    groups = {
        "p": torch.from_numpy(np.digitize(tokens.p.numpy(), P_EDGES[1:-1])),
        "token class": torch.tensor([present.index(number) for number in classes.tolist()]),
        "position in the response": torch.from_numpy(np.digitize(tokens.position.numpy(), [1, 4, 16, 64, 256, 1024])),
        "source": torch.tensor([("first", "second").index(source) for source in exact.sources]),
    }
    assert found["groups"]["token class"]["labels"] == [CLASSES[number] for number in present]
    assert found["groups"]["source"]["labels"] == ["first", "second"]
    for weighting in (Uniform(), DFT()):
        name, mass = type(weighting).__name__, exact.pull(weighting.weights(tokens))
        for title, group in groups.items():
            labels = found["groups"][title]["labels"]
            assert found["weightings"][name]["shares"][title] == pytest.approx(
                shares(mass, group, len(labels)), abs=CLOSE
            )
            evenly = shares(torch.ones(len(mass)).double(), group, len(labels))
            assert found["groups"][title]["tokens"] == pytest.approx(evenly, abs=1e-9)


def test_a_run_that_means_over_sequences_weighs_tokens_so(tmp_path, sharp, two_sources):
    args = ("--model.normalize", "sequences", "--weightings", "Uniform")
    found = diagnose(tmp_path, sharp, two_sources, *args, "--gradient_rows", 0)
    exact = truth(sharp, train_rows(sharp, two_sources).train_rows)
    each = 1.0 / exact.tokens.sequence_sum(torch.ones(len(exact.tokens)).double())
    group = torch.tensor([("first", "second").index(source) for source in exact.sources])
    expected = shares(exact.pull(each), group, 2)
    assert found["weightings"]["Uniform"]["shares"]["source"] == pytest.approx(expected, abs=CLOSE)
    assert expected != pytest.approx(shares(exact.pull(torch.ones(len(each))), group, 2), abs=CLOSE)


def test_the_effective_sample_and_the_mean_weight(tmp_path, model_dir, rows_file):
    found = diagnose(tmp_path, model_dir, rows_file, "--gradient_rows", 0)["weightings"]
    p = truth(model_dir, train_rows(model_dir, rows_file).train_rows).tokens.p
    assert list(found) == ["Uniform", "DFT", "DFT(floor=0.1)"]  # the configured one is Uniform
    assert (found["Uniform"]["effective"], found["Uniform"]["mean"]) == (1.0, 1.0)
    for name, weight in (("DFT", p), ("DFT(floor=0.1)", p.clamp(min=0.1))):
        assert found[name]["mean"] == pytest.approx(float(weight.mean()), rel=CLOSE)
        share = float(weight.sum() ** 2 / (len(p) * weight.square().sum()))
        assert found[name]["effective"] == pytest.approx(share, rel=CLOSE)


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
def test_norm_and_cosine_are_those_of_the_whole_gradient(tmp_path, model_dir, rows_file, own, normalize):
    """Of a step over four of the rows, spread evenly, whose micro-batches are 3 and 1."""
    above, mean = "my_own.Above", "my_own.MeanOne"
    args = ("--model.normalize", normalize, "--gradient_rows", 4, "--weightings", "Uniform", "DFT", above, mean)
    found = diagnose(tmp_path, model_dir, rows_file, *args)
    assert found["gradient_rows"] == 4
    exact = truth(model_dir, train_rows(model_dir, rows_file).train_rows.select([0, 8, 16, 25]))
    tokens, each = exact.tokens, torch.ones(len(exact.tokens)).double()
    if normalize == "sequences":
        each = 1.0 / tokens.sequence_sum(each)
    units, p = each.sum(), tokens.p
    expected = {
        "Uniform": exact.loss(each) / units,
        "DFT": exact.loss(each * p) / units,
        "Above": exact.loss(each * (p > p.mean())) / units,
        "MeanOne": exact.loss(each * p) / (each * p).sum(),
    }
    plain = exact.gradient(expected["Uniform"])
    for name, loss in expected.items():
        gradient, one = exact.gradient(loss), found["weightings"][name]["direction"]
        assert one["norm"] == pytest.approx(float(gradient.norm()), rel=CLOSE)
        assert one["ratio"] == pytest.approx(float(gradient.norm() / plain.norm()), rel=CLOSE)
        cosine = float(torch.nn.functional.cosine_similarity(gradient, plain, dim=0))
        assert one["cosine"] == pytest.approx(cosine, abs=CLOSE)
    assert found["weightings"]["DFT"]["direction"]["cosine"] < 0.999


def test_the_gradients_are_those_of_the_first_step_of_a_fit(tmp_path, model_dir, rows_file):
    data = {"num_samples": 8, "subset": "first"}
    found = diagnose(tmp_path, model_dir, rows_file, "--weightings", "DFT", **data)
    steps = {}
    for weighting in (Uniform(), DFT()):
        options = data | {"max_length": 60, "global_batch_size": 8, "micro_batch_size": 3}
        _, recorder, _ = fit(model_dir, rows_file, weighting, data=options)
        (steps[type(weighting).__name__],) = recorder.gradients
    ratio = float(steps["DFT"].norm() / steps["Uniform"].norm())
    cosine = float(torch.nn.functional.cosine_similarity(steps["DFT"], steps["Uniform"], dim=0))
    direction = found["weightings"]["DFT"]["direction"]
    assert direction["ratio"] == pytest.approx(ratio, rel=1e-5)
    assert direction["cosine"] == pytest.approx(cosine, abs=1e-5)


def test_one_pass_serves_all_weightings(tmp_path, model_dir, rows_file, own, monkeypatch):
    calls, forward = [], WeightedLM.forward

    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WeightedLM, "forward", counted)
    names = ["Uniform", "DFT", "ImportanceWeighted", "my_own.Above"]
    args = ("--sample_rows", 7, "--gradient_rows", 2, "--weightings", *names)
    found = diagnose(tmp_path, model_dir, rows_file, *args)
    assert calls.count(False) == 3  # micro-batches of 3, 3 and 1 rows
    assert calls.count(True) == 4  # one of 2 rows for each weighting; Uniform is what the others are compared with
    assert found["weightings"]["ImportanceWeighted"]["mean"] == 1.0  # the model is its own reference


def test_a_sample_is_spread_over_the_rows(tmp_path, model_dir, two_sources):
    found = diagnose(tmp_path, model_dir, two_sources, "--sample_rows", 3, "--gradient_rows", 0)
    exact = truth(model_dir, train_rows(model_dir, two_sources).train_rows.select([0, 6, 13]))
    assert found["tokens"] == len(exact.tokens)
    assert found["signs"]["nll"] == pytest.approx(float(-exact.tokens.logp.mean()), abs=CLOSE)


def test_stop_tokens_and_the_warning(tmp_path, model_dir, rows_file):
    found = diagnose(tmp_path, model_dir, rows_file, "--gradient_rows", 0)["stop"]
    module = train_rows(model_dir, rows_file)
    tokens = truth(model_dir, module.train_rows).tokens
    p = tokens.p[tokens.target == module.tokenizer.eos_token_id]
    assert found["count"] == len(p)
    assert found["turns"] == 26
    assert len(p) < 26  # the longest rows are cut off before
    assert found["mean"] == pytest.approx(float(p.mean()), rel=CLOSE)
    assert found["quantiles"]["0.5"] == pytest.approx(float(p.median() if len(p) % 2 else p.quantile(0.5)), rel=CLOSE)
    assert float(p.quantile(0.5)) < 0.01
    for part in (
        "p times SFT's",
        "--model.weighting.floor 0.1",
        "--model.weighting Exempt --model.weighting.of DFT",
        "hardly",
    ):
        assert part in found["warning"]


def test_no_turn_that_ends_is_said(tmp_path, model_dir, rows_file):
    found = diagnose(tmp_path, model_dir, rows_file, "--gradient_rows", 0, max_length=37)["stop"]
    assert (found["count"], found["mean"], found["quantiles"]) == (0, None, {})
    assert "none of 26 turns ends" in found["warning"]


def test_the_tokens_at_the_extremes(tmp_path, sharp, rows_file):
    found = diagnose(tmp_path, sharp, rows_file, "--gradient_rows", 0)["extremes"]
    module = train_rows(sharp, rows_file)
    tokens = truth(sharp, module.train_rows).tokens
    low = tokens.p < 0.01
    assert found["p < 0.01"]["share"] == pytest.approx(float(low.double().mean()))
    ids, counts = tokens.target[low].unique(return_counts=True)
    most = found["p < 0.01"]["tokens"]
    assert [one["count"] for one in most] == sorted(counts.tolist(), reverse=True)[:12]
    count_of = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    for one in most:
        assert one["count"] == count_of[one["id"]]
        assert one["text"] == module.tokenizer.decode([one["id"]])
        assert one["p"] == pytest.approx(float(tokens.p[low & (tokens.target == one["id"])].mean()), rel=1e-3)


def test_weightings_from_yaml_nested_and_of_ones_own(tmp_path, model_dir, rows_file, own):
    config = tmp_path / "look.yaml"
    floor = {"class_path": "DFT", "init_args": {"floor": 0.5}}
    nested = {"class_path": "my_own.Twice", "init_args": {"of": floor}}
    config.write_text(json.dumps({"weightings": ["Uniform", nested], "gradient_rows": 2, "sample_rows": 4}))
    found = diagnose(tmp_path, model_dir, rows_file, "--config", config)
    assert list(found["weightings"]) == ["Uniform", "Twice(of=DFT(floor=0.5))"]
    again = diagnose(
        tmp_path, model_dir, rows_file, "--sample_rows", 4, "--gradient_rows", 2, "--weightings", json.dumps(nested)
    )
    assert again["weightings"] == {name: one for name, one in found["weightings"].items() if name != "Uniform"}


def test_the_configured_weighting_is_among_those_compared(tmp_path, model_dir, rows_file):
    args = ("--model.weighting", "DFT", "--model.weighting.floor", "0.25", "--gradient_rows", 0)
    found = diagnose(tmp_path, model_dir, rows_file, *args)
    assert list(found["weightings"]) == ["DFT(floor=0.25)", "Uniform", "DFT", "DFT(floor=0.1)"]
    assert found["facts"]["configured weighting"] == "DFT(floor=0.25)"


def test_the_page_needs_nothing_and_lets_no_markup_through(tmp_path, model_dir, capsys):
    hostile = "</b><script>alert(1)</script>\x1b[31m"
    rows = write_jsonl(tmp_path / "rows.jsonl", [row | {"source": hostile} for row in sums(6)])
    diagnose(tmp_path, model_dir, rows, "--gradient_rows", 2)
    text = (tmp_path / "out" / "diagnosis.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    said = capsys.readouterr().out
    assert "\x1b[31m" not in said + text
    assert "Verdict" in said
    assert text.count("<svg") == 7  # P(stop), p, entropy, and one for each way to sort tokens
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["diagnosis.html", "diagnosis.json"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--weightings", "Nonsense"], "--weightings 'Nonsense' is none of ASFT, "),
        (["--weightings", "my_own.Missing"], "my_own.Missing"),
        (["--weightings", "{class_path: DFT, init_args: {floor: 7}}"], "DFT.floor is 7"),
        (["--weightings", "{class_path: DFT, init_args: {roof: 7}}"], "roof"),
        (["--weightings", "my_own.Rewarded"], "Rewarded needs rewards"),
        (["--data.path", "nowhere.jsonl"], "'nowhere.jsonl' matches no files"),
        (["--sample_rows", "0"], "--sample_rows is 0; expected 1 or more"),
        (["--gradient_rows", "-1"], "--gradient_rows is -1; expected 0 or more"),
        (["--output", "out.json"], "expected a name in .html"),
        (["--model.logits", "bfloat16"], "model.logits is bfloat16"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(tmp_path, model_dir, rows_file, own, capsys, args, message):
    status = main(["diagnose", *options(model_dir, rows_file), "--run_dir", str(tmp_path / "run"), *args])
    said = capsys.readouterr().err
    assert status == 2
    errors = [line for line in said.splitlines() if line.startswith("dft: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_said(tmp_path, model_dir, rows_file, capsys):
    (tmp_path / "file").write_text("")
    args = ["--output", str(tmp_path / "file" / "page.html"), "--gradient_rows", "0", "--sample_rows", "1"]
    assert main(["diagnose", *options(model_dir, rows_file), *args]) == 2
    assert "name another place by --output" in capsys.readouterr().err


def test_extremes_show_whole_characters(tmp_path, model_dir):
    """The tiny tokenizer cuts each letter with an accent in two."""
    rows = [row | {"solution": "é à"} for row in sums(6)]
    found = diagnose(tmp_path, model_dir, write_jsonl(tmp_path / "accents.jsonl", rows), "--gradient_rows", 0)
    texts = {one["text"] for extreme in found["extremes"].values() for one in extreme["tokens"]}
    assert texts <= {"·é", "é", "·à", " ·à", "à", " ", "·", "<|im_end|>"}
    assert {"é", "à"} & texts
    assert not any("\ufffd" in text for text in texts)
