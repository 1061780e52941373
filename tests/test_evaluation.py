"""The yardstick: answers that batches do not change, KL by hand, intervals by hand, and the stage's files."""

import csv
import hashlib
import json
import math
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from rlhf.curves import CurveRecorder, no_log, write_json
from rlhf.data.formats import read_rows, write_rows
from rlhf.encoding import Reading, encode_prompt
from rlhf.errors import UserError
from rlhf.evaluation.comparison import QUANTILE, Estimate, compare, estimate_mean, estimate_share, score_interval
from rlhf.evaluation.frontier import Frontier, Point, area_under, expected_best
from rlhf.evaluation.generation import Completion, Decoding, GumbelNoise, generate
from rlhf.evaluation.kl import completion_log_probs, kl_per_answer, kl_to_reference
from rlhf.evaluation.report import draw_frontier, rank_prompts
from rlhf.evaluation.yardstick import Measured
from rlhf.health import write_health
from rlhf.ledger import Ledger, Limit
from rlhf.models import load_causal, load_tokenizer, save_model
from rlhf.params import LedgerParams
from rlhf.params.rewards import FunctionReward, LengthReward
from rlhf.params_file import load_params
from tasks.evaluate import run
from tasks.paths import Paths

ROOT = Path(__file__).parent.parent
Z2 = QUANTILE**2


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return make_lively(load_causal(tiny_model_dir), 0)


def make_lively(model, seed):
    """Weights so large that tokens differ in probability, and that answers end now and then."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.6
    return model


@pytest.fixture(scope="module")
def prompts(tiny_world):
    return [row["prompt"][-5 - 6 * number :] for number, row in enumerate(tiny_world.prompts[1][:9])]


# answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_the_batch_or_on_other_prompts(model, tokenizer, prompts, temperature):
    answers = generate(model, tokenizer, prompts, Decoding(12, temperature, 9, 3))
    assert len({tuple(answer.token_ids) for answer in answers}) > 5
    for batch_size in (1, 2, 4):
        assert generate(model, tokenizer, prompts, Decoding(12, temperature, batch_size, 3)) == answers
    assert generate(model, tokenizer, prompts[:4], Decoding(12, temperature, 9, 3)) == answers[:4]


def test_answers_depend_on_the_seed_alone(model, tokenizer, prompts):
    first = generate(model, tokenizer, prompts, Decoding(12, 1.0, 4, 3))
    torch.rand(5)
    assert generate(model, tokenizer, prompts, Decoding(12, 1.0, 4, 3)) == first
    assert generate(model, tokenizer, prompts, Decoding(12, 1.0, 4, 4)) != first


def test_greedy_answers_are_the_likeliest_tokens(model, tokenizer, prompts):
    """Decoded step by step without cache, batch or padding."""
    answers = generate(model, tokenizer, prompts, Decoding(6, 0.0, 4, 0))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = encode_prompt(tokenizer, prompt)
        for token in answer.token_ids:
            with torch.inference_mode():
                assert model(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == token
            ids = [*ids, token]


def test_noise_draws_from_the_softmax_at_its_temperature():
    """Probabilities 0.5, 0.3, 0.2 at temperature 2 from logits 2·log p; three standard errors of 4000 draws."""
    shares = torch.tensor([0.5, 0.3, 0.2])
    noise = GumbelNoise(Decoding(1, 2.0, 4000, 11), range(4000))
    drawn = noise(torch.empty(0), (2 * shares.log()).repeat(4000, 1)).argmax(-1)
    found = torch.bincount(drawn, minlength=3) / 4000
    assert ((found - shares).abs() < 3 * (shares * (1 - shares) / 4000).sqrt()).all()


class Scripted:
    """Stands for a model whose generate appends given tokens."""

    device = torch.device("cpu")
    generation_config = GenerationConfig(repetition_penalty=5.0)

    def __init__(self, *continuations):
        self.continuations = continuations

    def generate(self, input_ids, **_):
        assert self.generation_config.repetition_penalty != 5.0
        return torch.cat([input_ids, torch.tensor(self.continuations)], 1)


@pytest.mark.parametrize("padding_is_end", [False, True])
def test_an_answer_reaches_to_its_first_end_token(tiny_model_dir, padding_is_end):
    tokenizer = load_tokenizer(tiny_model_dir)
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    if padding_is_end:
        tokenizer.pad_token, padding = tokenizer.eos_token, end
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    model = Scripted([a, b, a], [a, end, padding], [end, padding, padding], [a, b, end])
    answers = generate(model, tokenizer, ["x"] * 4, Decoding(3, 0.0, 4, 0))
    assert answers == [
        Completion("aba", [a, b, a], False),
        Completion("a", [a, end], True),
        Completion("", [end], True),
        Completion("ab", [a, b, end], True),
    ]
    assert model.generation_config.repetition_penalty == 5.0


def test_messages_are_rendered_by_the_template(model, tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    decoding = Decoding(4, 1.0, 2, 0)
    messages = [[{"role": "user", "content": "a b"}]]
    assert generate(model, tokenizer, messages, decoding) == generate(model, tokenizer, ["a b!"], decoding)


# log-probabilities and KL -------------------------------------------------------------------------

SEQUENCES = [([5, 6, 7, 8, 9], [10, 11]), ([5], [12, 13, 14, 15]), ([7, 9], [20]), ([8, 8, 8], [30, 31, 32, 1])]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_log_probs_are_those_of_the_sequence_alone(model, temperature, batch_size):
    found = completion_log_probs(model, SEQUENCES, temperature, batch_size)
    for (prompt, completion), values in zip(SEQUENCES, found, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
        expected = [
            logits[len(prompt) + place - 1].log_softmax(-1)[token].item() for place, token in enumerate(completion)
        ]
        assert values.tolist() == pytest.approx(expected, abs=2e-5)


def test_padding_does_not_shift_learned_positions():
    """GPT-2 looks its positions up in a table, so that a prompt padded on the left must start at the first."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    model.transformer.wpe.weight.data.normal_()
    together, alone = (completion_log_probs(model, SEQUENCES, 1.0, size) for size in (4, 1))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, alone, strict=True))


def test_many_logits_are_split_into_batches(model, monkeypatch):
    whole = completion_log_probs(model, SEQUENCES, 1.0, 4)
    sizes = []
    monkeypatch.setattr("rlhf.evaluation.kl.MAX_LOGITS", 5 * model.config.vocab_size)
    handle = model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    split = completion_log_probs(model, SEQUENCES, 1.0, 4)
    handle.remove()
    assert sizes == [1, 1, 1, 1]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, split, strict=True))


def test_kl_by_hand():
    """One answer of two tokens: log-ratios log 2 and −log 4.

    k1 = log 2 − log 4 = −log 2; k3 = (1/2 − 1 + log 2) + (4 − 1 − log 4) = 2.5 − log 2. Another answer of one token
    with log-ratio 0 has 0 of both; the mean over answers halves.
    """
    ours = [torch.tensor([0.5, 0.1]).log(), torch.tensor([0.3]).log()]
    theirs = [torch.tensor([0.25, 0.4]).log(), torch.tensor([0.3]).log()]
    assert kl_per_answer(ours, theirs, "k1") == pytest.approx([-math.log(2), 0], abs=1e-6)
    assert kl_per_answer(ours, theirs, "k3") == pytest.approx([2.5 - math.log(2), 0], abs=1e-6)
    assert kl_to_reference(ours, theirs, "k1") == pytest.approx(-math.log(2) / 2, abs=1e-6)


def test_kl_of_a_model_to_itself_is_zero_in_any_batch(model):
    ours = completion_log_probs(model, SEQUENCES, 1.0, 4)
    assert kl_to_reference(ours, completion_log_probs(model, SEQUENCES, 1.0, 4), "k1") == 0
    assert kl_to_reference(ours, completion_log_probs(model, SEQUENCES, 1.0, 1), "k3") == pytest.approx(0, abs=1e-6)


def test_k1_sees_a_collapsed_policy_where_k3_does_not():
    """A policy that always says the token to which the reference gives 0.3: KL = log(1/0.3), and k3 lacks the 0.7 of
    the reference's mass that the policy never samples: 0.3 − 1 + log(1/0.3)."""
    ours, theirs = [torch.zeros(1)] * 8, [torch.tensor([0.3]).log()] * 8
    assert kl_to_reference(ours, theirs, "k1") == pytest.approx(math.log(1 / 0.3), abs=1e-6)
    assert kl_to_reference(ours, theirs, "k3") == pytest.approx(math.log(1 / 0.3) - 0.7, abs=1e-6)


# comparison ---------------------------------------------------------------------------------------


def test_win_rate_counts_ties_half():
    wins = compare([1, 0, 1, 0.5], [0, 1, 1, 0.25])
    assert wins.mean == (2 + 0.5) / 4
    assert wins.low < wins.mean < wins.high


def test_the_interval_is_the_published_one():
    """1 win and 7 losses among 21: −0.517 to −0.026 (Fagerland, Lydersen and Laake, BMC Med Res Methodol 14, 2014)."""
    assert score_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    low, high = score_interval(1, 7, 21)
    assert score_interval(7, 1, 21) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize("prompts", [1, 10, 500])
def test_the_interval_by_hand_at_its_ends(prompts):
    """All ties: the P(loss) that is likeliest under Δ > 0 is 0, so n²Δ² = z²·nΔ(1 − Δ), Δ = z²/(n + z²). All wins:
    likeliest P(loss) is (1 − Δ)/2, so n²(1 − Δ)² = z²·n(1 − Δ)(1 + Δ), and the win rate (1 + Δ)/2 = n/(n + z²)."""
    ties, wins = compare([1] * prompts, [1] * prompts), compare([1] * prompts, [0] * prompts)
    half = Z2 / (prompts + Z2) / 2
    assert (ties.low, ties.mean, ties.high) == pytest.approx((0.5 - half, 0.5, 0.5 + half))
    assert (wins.low, wins.mean, wins.high) == pytest.approx((prompts / (prompts + Z2), 1, 1))


def test_the_interval_covers_as_often_as_it_says():
    """Exact coverage over all outcomes of 20 prompts with 30 % wins and 10 % losses."""
    covered = 0.0
    for wins in range(21):
        for losses in range(21 - wins):
            low, high = score_interval(wins, losses, 20)
            ways = math.comb(20, wins) * math.comb(20 - wins, losses)
            chance = ways * 0.3**wins * 0.1**losses * 0.6 ** (20 - wins - losses)
            covered += chance * (low <= 0.2 <= high)
    assert 0.94 < covered < 0.98


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="0 rewards against 0"):
        compare([], [])
    with pytest.raises(ValueError, match="1 rewards against 2"):
        compare([1], [1, 2])


def test_means_have_intervals():
    """Shares: Wilson, at 1 from n/(n + z²), at 0 to z²/(n + z²). Means: 1, 2, 3 have variance 1, so half is z/√3."""
    ones, zeros = estimate_share([1.0] * 8), estimate_share([0.0] * 8)
    assert (ones.low, ones.mean, ones.high) == (pytest.approx(8 / (8 + Z2)), 1, 1)
    assert (zeros.low, zeros.mean, zeros.high) == (0, 0, pytest.approx(Z2 / (8 + Z2)))
    other = estimate_mean([1.0, 2.0, 3.0])
    assert (other.mean, other.high - 2) == pytest.approx((2, QUANTILE / math.sqrt(3)))


# the stage ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    params = load_params(ROOT / "params.yaml")
    evaluate = {"prompts": 10, "max_new_tokens": 8, "batch_size": 4, "samples_shown": 4, "best_of": 2}
    policies = {name: params.policies[name] for name in ("dpo", "grpo")}
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update=evaluate), "policies": policies})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_model_dir, tiny_reward_dir, tiny_world):
    """SFT model and policies with weights of their own; grpo is the SFT model itself."""
    paths = Paths(tmp_path_factory.mktemp("workspace"))
    tokenizer = load_tokenizer(tiny_model_dir)
    for seed, folder in enumerate((paths.model("sft"), paths.model("policy", "dpo"), paths.model("policy", "grpo"))):
        save_model(make_lively(load_causal(tiny_model_dir), seed % 2), tokenizer, folder)
    shutil.copytree(tiny_reward_dir, paths.model("reward"))
    prompts = [{**row, "prompt": row["prompt"] + "<b> & co"} for row in tiny_world.prompts[1]]
    write_rows(paths.rows("prompts", "test"), prompts)
    # An odd number, all labelled wrongly: true and given labels cannot give the same accuracy.
    pairs = [{**row, "truth_flipped": True} for row in tiny_world.preferences[1][:7]]
    write_rows(paths.rows("preferences", "test"), pairs)
    for name, looks in {"grpo": [], "dpo": [(0, 0.5, 0.0), (20, 0.75, 0.25)]}.items():
        curves = CurveRecorder(no_log)
        curves({"loss": 1.0}, 10)
        for step, gold, kl in looks:
            curves(look(gold, kl), step)
        curves.write(paths.report("policy", name) / "curves.csv")
    for folder in (*map(paths.report, ("sft", "reward", "probe")), paths.report("policy", "grpo")):
        write_health(folder, "sft", {1: {"grad_norm": 1.0}})
    write_health(paths.report("policy", "dpo"), "dpo", {1: {"rewards/margins": 40.0}})
    ledger = Ledger(LedgerParams(on_too_long="drop", max_lost_share=1.0))
    rows = [Reading("r1", ([5, 6, 7],), (1,)), Reading("r2", ([5] * 4321,), (1,))]
    ledger.admit("rows", rows, Limit(4000, "short"), tokenizer)
    for folder in (*map(paths.report, ("sft", "embed")), *(paths.report("policy", name) for name in ("dpo", "grpo"))):
        ledger.write(folder)
    quality = {"near_duplicates": 0.125, "contaminated": None}
    kept = {"kept": {"train": 7, "test": 1}, "rows_read": 10, "quarantined": {"too_short": 2}}
    style = {"style": {"digits": 0.1, "lists": -0.5, "markup": None}}
    validation = {"preferences": kept | {"quality": quality | style}, "prompts": kept | {"quality": quality}}
    write_json(paths.metrics("validate"), validation | {"warnings": ["prompts: <near_duplicates>"], "success": True})
    write_json(paths.report("sft") / "trained_on.json", [{"row": "r1", "given": "<b>", "learnt": "learnt <eos>"}])
    return paths


def look(gold, kl):
    """What a watch logs of a policy, as far as the frontier reads it."""
    names = [f"watch/{reward}_reward{end}" for reward in ("gold", "proxy") for end in ("", "_low", "_high")]
    return {"watch/kl_to_sft": kl, **dict.fromkeys(names, gold)}


@pytest.fixture(scope="module")
def metrics(params, workspace):
    run(params, workspace, no_log)
    return json.loads(workspace.metrics("evaluate").read_text())


def outputs(paths):
    files = [*sorted(paths.report("evaluate").iterdir()), paths.metrics("evaluate")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_policy_has_every_figure(metrics):
    assert list(metrics) == ["dpo", "grpo", "sft"]
    wanted = {"gold_reward", "proxy_reward", "kl_to_sft", "win_rate", "win_rate_low", "win_rate_high", "mean_tokens"}
    wanted |= {"stop_rate", "gold_reward_greedy", "preference_accuracy", "preference_margin", "chosen_log_prob_drift"}
    for figures in metrics.values():
        assert wanted <= figures.keys()
        assert figures["kl_estimator"] == "k1"
        assert figures["prompts"] == 10
        assert all(isinstance(value, str) or math.isfinite(value) for value in figures.values())


def test_a_policy_that_is_the_sft_model_has_its_figures(metrics):
    """And the SFT model is at a distance of 0 from itself, where the other policy is not."""
    assert metrics["grpo"] == metrics["sft"]
    assert (metrics["sft"]["kl_to_sft"], metrics["sft"]["win_rate"]) == (0, 0.5)
    assert metrics["sft"]["preference_accuracy"] == 0.5
    assert metrics["sft"]["chosen_log_prob_drift"] == 0
    assert metrics["dpo"]["kl_to_sft"] > 0.1
    drift = metrics["dpo"]["chosen_log_prob_drift"] - metrics["dpo"]["rejected_log_prob_drift"]
    assert metrics["dpo"]["preference_margin"] == pytest.approx(drift, abs=1e-3)


def test_preference_figures_by_hand(metrics, workspace, params):
    """Each answer's log-probability summed token by token, end token included, and the flipped labels turned."""
    tokenizer = load_tokenizer(workspace.model("sft"))
    models = {name: load_causal(folder) for name, folder in {
        "sft": workspace.model("sft"), "dpo": workspace.model("policy", "dpo")}.items()}  # fmt: skip

    def log_prob(name, row, side):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row[side])["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = models[name](input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logits[place - 1, ids[place]].item() for place in range(len(prompt), len(ids)))

    rows = read_rows(workspace.rows("preferences", "test"))
    drift = {
        side: [log_prob("dpo", row, side) - log_prob("sft", row, side) for row in rows]
        for side in ("chosen", "rejected")
    }
    margins = [a - b for a, b in zip(*drift.values(), strict=True)]
    found = metrics["dpo"]
    assert found["chosen_log_prob_drift"] == pytest.approx(sum(drift["chosen"]) / len(rows), rel=1e-3)
    assert found["preference_margin"] == pytest.approx(sum(margins) / len(rows), rel=1e-2)
    assert found["preference_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / len(rows), rel=1e-4)
    clean = [(margin > 0) != row["truth_flipped"] for margin, row in zip(margins, rows, strict=True)]
    assert found["preference_accuracy_clean"] == pytest.approx(sum(clean) / len(rows), rel=1e-4)


def test_the_stage_writes_the_same_bytes_twice(metrics, params, workspace):
    before = outputs(workspace)
    tables = {"evaluate.json", "frontier.csv", "policies.csv", "samples.json"}
    assert set(before) == {*tables, "frontier.png", "report.html"}
    logged = []
    run(params, workspace, lambda figures, step: logged.append(figures))
    assert outputs(workspace) == before
    assert {name for figures in logged for name in figures} >= {"dpo/gold_reward", "sft/kl_to_sft"}


def test_the_report_shows_all_and_escapes_what_it_shows(metrics, workspace):
    page = (workspace.report("evaluate") / "report.html").read_text()
    rows = "<td>10</td><td>7</td><td>1</td>", "<td>12.5%</td><td>–</td>", "2 too short"
    assert [page.count(cells) for cells in rows] == [2, 2, 2]
    assert page.count("<td>lists -0.50</td>") == page.count("<td>–</td></tr>") == 1
    assert "prompts: &lt;near duplicates&gt;" in page
    assert page.count("<article") == 4 + 1, "a card per prompt, and what is learnt of a row"
    assert "learnt &lt;eos&gt;" in page
    assert page.count("1 too long") == 4, "sft, embed, dpo and grpo"
    assert "<td>4321</td><td>4000</td>" in page
    assert "&lt;b&gt; &amp; co" in page
    assert "<b>" not in page
    assert "data:image/png;base64," in page
    assert '<td>dpo</td><td class="bad">stop</td><td>margin too large</td>' in page
    assert page.count("rules found nothing") == 4, "sft, reward, probe and grpo"
    assert "http" not in page.replace("http-equiv", "")
    samples = json.loads((workspace.report("evaluate") / "samples.json").read_text())
    assert [row["policy"] for row in samples[:3]] == ["sft", "dpo", "grpo"]
    assert len(samples) == 4 * 3
    assert set(samples[0]) == {"prompt", "policy", "answer", "gold", "proxy", "tokens", "ended"}
    with (workspace.report("evaluate") / "policies.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["policy"] for row in table] == ["sft", "dpo", "grpo"]
    assert float(table[1]["kl_to_sft"]) == metrics["dpo"]["kl_to_sft"]


def copied(workspace, folder):
    shutil.copytree(workspace.root, folder / "copy")
    return Paths(folder / "copy")


def test_without_reward_model_and_preferences_proxies_are_null(params, workspace, metrics, tmp_path):
    paths = copied(workspace, tmp_path)
    shutil.rmtree(paths.model("reward"))
    write_rows(paths.rows("preferences", "test"), [])
    run(params, paths, no_log)
    found = json.loads(paths.metrics("evaluate").read_text())
    assert all(figures["proxy_reward"] is None for figures in found.values())
    assert "preference_accuracy" not in found["dpo"]
    assert found["dpo"]["kl_to_sft"] == metrics["dpo"]["kl_to_sft"]


def test_a_judge_may_be_the_gold_reward(params, workspace, tmp_path):
    """Here the judge is the reward model, so gold and proxy agree, and no row needs an answer."""
    paths = copied(workspace, tmp_path)
    shutil.copytree(paths.model("reward"), paths.model("judge"))
    rows = [{"id": row["id"], "prompt": row["prompt"]} for row in read_rows(paths.rows("prompts", "test"))]
    write_rows(paths.rows("prompts", "test"), rows)
    with pytest.raises(UserError, match="has no `answer`"):
        run(params, paths, no_log)
    section = params.evaluate.model_copy(update={"gold": "judge", "samples_shown": 10})
    run(params.model_copy(update={"evaluate": section}), paths, no_log)
    figures = json.loads(paths.metrics("evaluate").read_text())["dpo"]
    assert figures["gold_reward"] == pytest.approx(figures["proxy_reward"], rel=1e-4)
    samples = json.loads((paths.report("evaluate") / "samples.json").read_text())
    golds = {name: [row["gold"] for row in samples if row["policy"] == name] for name in ("dpo", "sft")}
    assert len(set(golds["sft"])) == 10
    wins = sum(ours > theirs for ours, theirs in zip(golds["dpo"], golds["sft"], strict=True))
    assert figures["win_rate"] == pytest.approx(wins / 10)
    assert "✓" not in (paths.report("evaluate") / "report.html").read_text()


def test_gold_may_be_a_reward_of_any_kind(params, workspace, tmp_path):
    """Twice the number of characters within a band: no right or wrong, so means with their intervals, and no ticks."""
    paths = copied(workspace, tmp_path)
    length = LengthReward(kind="length", weight=2.0, shortest=500, longest=1000, unit="characters")
    section = params.evaluate.model_copy(update={"gold": length, "samples_shown": 10})
    run(params.model_copy(update={"evaluate": section}), paths, no_log)
    samples = json.loads((paths.report("evaluate") / "samples.json").read_text())
    for row in samples:
        assert row["gold"] == pytest.approx(max(0.0, 2 * (2 * len(row["answer"]) / 500 - 1)), abs=1e-5)
    page = (paths.report("evaluate") / "report.html").read_text()
    assert "the reward length that evaluate.gold names" in page
    assert "✓" not in page


def test_gold_of_a_file_that_dvc_does_not_watch_is_refused(params, workspace, tmp_path):
    paths = copied(workspace, tmp_path)
    (paths.root / "dvc.yaml").write_text("stages: {evaluate: {deps: [rewards]}}")
    (paths.root / "mine.py").write_text("def score(prompts, completions, **columns): return [1.0] * len(prompts)")
    own = FunctionReward(kind="function", weight=1.0, path="mine.py", name="score")
    section = params.evaluate.model_copy(update={"gold": own})
    with pytest.raises(UserError, match=r"evaluate.gold reads mine.py, which is no dep of the stage evaluate"):
        run(params.model_copy(update={"evaluate": section}), paths, no_log)


def test_what_cannot_be_measured_ends_in_a_sentence(params, workspace, tmp_path):
    paths = copied(workspace, tmp_path)
    write_rows(paths.rows("prompts", "test"), [])
    with pytest.raises(UserError, match="no held-out prompt"):
        run(params, paths, no_log)
    tokenizer = load_tokenizer(paths.model("policy", "dpo"))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(paths.model("policy", "dpo"))
    with pytest.raises(UserError, match="the vocabulary size is"):
        run(params, paths, no_log)
    (paths.report("policy", "grpo") / "health.json").unlink()
    with pytest.raises(UserError, match="reports/policy/grpo/health.json does not exist; run `dvc repro`"):
        run(params, paths, no_log)
    shutil.rmtree(paths.model("policy", "dpo"))
    with pytest.raises(UserError, match="models/policy/dpo holds no model; run `dvc repro` to train dpo first"):
        run(params, paths, no_log)


# picture and order --------------------------------------------------------------------------------


def measured(gold, proxy=None, kl=(0.0, 0.0, 0.0)):
    answers = [Completion("x", [1], True)] * len(gold)
    return Measured({}, answers, list(gold), proxy, list(kl), estimate_share(gold))


def test_prompts_with_disagreement_come_first_then_those_all_get_wrong():
    policies = {"sft": measured([1, 0, 1, 0]), "ppo": measured([1, 0, 0, 0])}
    assert rank_prompts(policies) == [2, 1, 3, 0]


def test_the_picture_is_drawn_with_and_without_proxy(tmp_path):
    estimate = Estimate(0.5, 0.4, 0.6)
    for name, proxy in {"gold.png": None, "both.png": estimate}.items():
        saved = {policy: Point(policy, None, 0.0, estimate, proxy) for policy in ("sft", "ppo")}
        draw_frontier(tmp_path / name, Frontier({"ppo": [saved["sft"], saved["ppo"]]}, saved, []))
    widths = [int.from_bytes((tmp_path / name).read_bytes()[16:20], "big") for name in ("gold.png", "both.png")]
    assert widths[1] == 2 * widths[0]


# frontier -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "area"),
    [
        ([(0, 0.5)], 0.0),
        ([(0, 0.5), (1.0, 0.7)], 0.1),
        ([(0, 0.5), (1.0, 0.7), (0.5, 0.9)], 0.3),
        ([(0, 0.5), (1.0, 0.4), (1.5, 0.6)], 0.025),
        ([(0, 0.5), (-0.1, 0.6)], 0.1),
        ([(0, 0.5), (2.5, 0.9)], 0.0),
    ],
    ids=["no training", "one step up", "the best so far counts", "a loss counts for nothing", "below 0", "too far"],
)
def test_the_area_under_a_frontier_by_hand(states, area):
    assert area_under(states, 2.0) == pytest.approx(area)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_best_of_some_answers_is_the_mean_over_all_choices(size):
    values, scores = [0.0, 1.0, 0.0, 1.0, 1.0], [0.3, 0.1, 0.9, 0.5, 0.2]
    chosen = [max(places, key=scores.__getitem__) for places in combinations(range(5), size)]
    by_hand = sum(values[place] for place in chosen) / len(chosen)
    assert expected_best(values, scores, size) == pytest.approx(by_hand)


def test_the_frontier_holds_saved_policies_their_paths_and_the_best_of_n(metrics, workspace, params):
    with (workspace.report("evaluate") / "frontier.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["policy"], row["step"]) for row in rows] == [
        ("sft", ""), ("dpo", ""), ("grpo", ""), ("dpo", "0"), ("dpo", "20"), ("best of n", "2")
    ]  # fmt: skip
    assert float(rows[1]["gold_reward"]) == pytest.approx(metrics["dpo"]["gold_reward"], rel=1e-4)
    assert float(rows[4]["kl_to_sft"]) == 0.25
    assert float(rows[5]["kl_to_sft"]) == pytest.approx(math.log(2) - 0.5, rel=1e-4)
    best, plain = float(rows[5]["proxy_reward"]), float(rows[0]["proxy_reward"])
    assert best > plain
    budget = params.evaluate.kl_budget
    assert metrics["dpo"]["frontier_area"] == pytest.approx(0.25 * (budget - 0.25) / budget, rel=1e-4)
    assert metrics["sft"]["frontier_area"] == 0
