"""Resume that is proved: a training that was stopped ends at the same bytes and curves as one that was not."""

import logging
import math
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from rlhf import checkpoints as module
from rlhf import watch as watch_module
from rlhf.checkpoints import Checkpoints, random_state, set_random_state, training_key
from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import training_rows, write_rows
from rlhf.evaluation.prompts import GoldFiles
from rlhf.models import load_tokenizer, save_model
from rlhf.params import AdapterParams, AdaptiveBeta, DynamicSampling
from rlhf.params.rewards import AnswerReward
from rlhf.params_file import load_params
from rlhf.policies import groups, iterative_dpo, train_policy
from rlhf.policies.resuming import make_resumable
from rlhf.scoring import Reward
from rlhf.watch import GoldWatch, WatchFiles
from tasks import policy as stage
from tasks.paths import Paths
from tests.learning import sample_to_the_limit
from tests.test_families import section as family
from tests.tiny import share_of_letters, tiny_params, write_params

ROOT = Path(__file__).parent.parent
ADAPTER = AdapterParams(rank=2, alpha=4, dropout=0.0, target_modules="all-linear", quantise=None)
MOVING = {"score_scaling": "running", "adaptive_beta": AdaptiveBeta(target=0.5, horizon=40), "lr_scheduler": "cosine"}
"""Settings under which more than weights changes from rollout to rollout."""
REFILLED = {
    "advantage": "leave_one_out",
    "group_size": 4,
    "dynamic_sampling": DynamicSampling(max_refills=2),
    "rewards": {"answer": AnswerReward(kind="answer", weight=1.0, answer_in="form")},
}
"""A model this small answers nothing rightly: only the penalty of a missing end tells its answers apart."""

ACCUMULATED = {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}
PAIRS = ACCUMULATED | {"epochs": 2.0, "batch_size": 4}
GROUPS = ACCUMULATED | {
    "steps": 8,
    "update_epochs": 2,
    "rewards": {"reward_model": {"kind": "reward_model", "weight": 1.0}},
}
"""Six steps, and eight. The fifth, and the eleventh of longer trainings, is the end neither of an epoch, nor of the
ten steps that are logged as one, nor of the two that read the same answers."""

KILLED = """
import os, pickle, signal, sys
import trl
from rlhf.checkpoints import Checkpoints
from rlhf.curves import no_log
from rlhf.policies import train_policy

class Fatal(Checkpoints):
    def offer(self, step, make_state):
        super().offer(step, make_state)
        if step == 11:
            os.kill(os.getpid(), signal.SIGKILL)

ends = []
for section, files, folder in pickle.load(sys.stdin.buffer):
    child = os.fork()
    if not child:
        train_policy(section, files, 5, no_log, Fatal(folder, 0, float("inf")))
        os._exit(0)
    ends.append(os.waitpid(child, 0)[1])
print(ends)
"""


@pytest.fixture
def params():
    section = load_params(ROOT / "params.yaml").policies["ppo"]
    sizes = {"steps": 6, "batch_size": 8, "minibatches": 2, "max_new_tokens": 6, "learning_rate": 0.01}
    return section.model_copy(update=sizes | MOVING)


def always(folder):
    """Checkpoints after every step."""
    return Checkpoints(folder, 0, math.inf)


def reopened(folder):
    """The same, of a training named `key`."""
    checkpoints = always(folder)
    checkpoints.open("key")
    return checkpoints


def stop_at_four(figures, step):
    if step == 4:
        raise KeyboardInterrupt


def train(section, files, checkpoints, folder, log=no_log, watched=False):
    """Train as the stage does; returns the bytes of the model and of its curves."""
    curves = CurveRecorder(log)
    watch = make_watch(files, curves) if watched else None
    model = train_policy(section, files, 5, curves, checkpoints, watch)
    save_model(model, load_tokenizer(files.sft), folder)
    curves.write(folder / "curves.csv")
    return (folder / "model.safetensors").read_bytes(), (folder / "curves.csv").read_text(), curves.rows


def make_watch(files, log):
    """Looks after every step."""
    evaluate = load_params(ROOT / "params.yaml").evaluate
    watch = evaluate.watch.model_copy(update={"prompts": 6, "evaluations": 6})
    sizes = {"prompts": 2, "max_new_tokens": 6, "batch_size": 8, "watch": watch}
    gold = GoldFiles(files.sft, files.reward, files.root)
    watched = WatchFiles(files.sft, files.reward, gold, files.prompts)
    return GoldWatch(watch, evaluate.model_copy(update=sizes), watched, 5, log)


@pytest.mark.parametrize("algorithm", ["ppo", "dpo", "grpo"])
def test_a_watched_training_ends_where_an_uninterrupted_one_does(params, few, tmp_path, algorithm, monkeypatch):
    """With the state that the watch kept before the stop, and all that it had seen."""
    monkeypatch.setattr(watch_module, "gold_reward", lambda *_: Reward("gold", share_of_letters, 1.0))
    section = {"ppo": params, "dpo": family("dpo", **PAIRS), "grpo": family("grpo", **GROUPS)}[algorithm]
    with pytest.raises(KeyboardInterrupt):
        train(section, few, Stopping(tmp_path / "state"), tmp_path / "stopped", watched=True)
    resumed = train(section, few, always(tmp_path / "state"), tmp_path / "resumed", watched=True)
    assert resumed == train(section, few, None, tmp_path / "whole", watched=True)
    assert resumed[2][max(resumed[2])]["watch/saved_step"] < 5


@pytest.mark.parametrize(
    "changes",
    [{}, {"critic": "shared"}, {"adapter": ADAPTER, "critic": "adapter"}, {"advantage": "reward"}, REFILLED],
    ids=["separate", "shared", "adapter", "none", "refilled"],
)
def test_a_stopped_training_ends_where_an_uninterrupted_one_does(params, policy_files, tmp_path, caplog, changes):
    caplog.set_level(logging.INFO)
    section = params.model_copy(update=changes)
    expected = train(section, policy_files, None, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(section, policy_files, always(tmp_path / "state"), tmp_path / "stopped", stop_at_four)
    steps = []
    resumed = train(
        section,
        policy_files,
        always(tmp_path / "state"),
        tmp_path / "resumed",
        lambda figures, step: steps.append(step),
    )
    assert resumed == expected
    if section.dynamic_sampling:
        assert all(row["groups/refills"] > 0 for row in expected[2].values())
    assert "000000003.pt" in caplog.text
    assert steps == [1, 2, 3, 4, 5, 6]  # the listener hears of the steps before the stop too


@pytest.fixture(scope="module")
def few(policy_files, tmp_path_factory):
    """Pairs and prompts of which an epoch is three or four steps."""
    folder = tmp_path_factory.mktemp("few")
    for kind, count in (("preferences", 24), ("prompts", 8)):
        write_rows(folder / f"{kind}.jsonl", training_rows(getattr(policy_files, kind))[:count])
    return replace(policy_files, prompts=folder / "prompts.jsonl", preferences=folder / "preferences.jsonl")


def test_killed_processes_go_on(params, few, tmp_path):
    sections = {
        "ppo": params.model_copy(update={"steps": 12}),
        "dpo": family("dpo", **PAIRS | {"epochs": 4.0}),
        "grpo": family("grpo", **GROUPS | {"steps": 13}),
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=pickle.dumps([(section, few, tmp_path / name / "state") for name, section in sections.items()]),
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == b"[9, 9, 9]", done.stderr.decode()
    for name, section in sections.items():
        folder = tmp_path / name
        assert [path.stem for path in sorted(folder.rglob("*.pt"))] == ["000000010", "000000011"]
        resumed = train(section, few, always(folder / "state"), folder / "resumed")
        assert resumed == train(section, few, None, folder / "whole"), name


class Stopping(Checkpoints):
    """Checkpoints after every step, of which the fifth is the last."""

    def __init__(self, folder):
        super().__init__(folder, 0, math.inf)

    def offer(self, step, make_state):
        super().offer(step, make_state)
        if step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("dpo", PAIRS | {"adapter": ADAPTER}),
        ("kto", PAIRS | {"epochs": 1.0}),
        ("orpo", PAIRS),
        ("cpo", PAIRS | {"adapter": ADAPTER}),
        ("rloo", GROUPS | {"adapter": ADAPTER}),
    ],
    ids=["dpo", "kto", "orpo", "cpo", "rloo"],
)
def test_every_family_ends_where_an_uninterrupted_training_does(few, tmp_path, algorithm, changes):
    section = family(algorithm, **changes)
    expected = train(section, few, None, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(section, few, Stopping(tmp_path / "state"), tmp_path / "stopped")
    assert train(section, few, always(tmp_path / "state"), tmp_path / "resumed") == expected


def test_rounds_end_where_those_of_an_uninterrupted_training_do(few, tmp_path, monkeypatch):
    """Killed in the second of three rounds, the first is not done again; a watch looks after each."""
    monkeypatch.setattr(iterative_dpo, "sample", sample_to_the_limit)
    monkeypatch.setattr(iterative_dpo, "build_rewards", lambda *_: [Reward("mine", share_of_letters, 1.0)])
    monkeypatch.setattr(watch_module, "gold_reward", lambda *_: Reward("gold", share_of_letters, 1.0))
    section = family("iterative_dpo", rounds=3)
    expected = train(section, few, None, tmp_path / "whole", watched=True)
    assert sum("watch/gold_reward" in row for row in expected[2].values()) == 4

    def stop(figures, step):
        if figures.get("round") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(section, few, always(tmp_path / "state"), tmp_path / "stopped", stop, watched=True)
    rounds = []
    resumed = train(
        section, few, always(tmp_path / "state"), tmp_path / "resumed",
        lambda figures, step: rounds.append(figures.get("round")), watched=True,
    )  # fmt: skip
    assert resumed == expected
    assert [number for number in rounds if number] == [1, 2, 3]  # the first is only told again


def test_what_was_computed_is_not_computed_again(few, tmp_path, monkeypatch):
    judged = []
    reward = Reward("size", lambda prompts, completions, **_: judged.append(1) or [len(c) for c in completions], 1.0)
    monkeypatch.setattr(groups, "build_rewards", lambda *_: [reward])
    section = family("grpo", **GROUPS)
    with pytest.raises(KeyboardInterrupt):
        train(section, few, Stopping(tmp_path / "state"), tmp_path / "stopped")
    assert len(judged) == 3  # for steps 1, 3 and 5
    train(section, few, always(tmp_path / "state"), tmp_path / "resumed")
    assert len(judged) == 4


def test_several_processes_have_no_checkpoints(tmp_path, caplog):
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2), add_callback=pytest.fail)
    make_resumable(trainer, always(tmp_path))
    assert "a stop costs the whole training" in caplog.text


def test_other_params_seeds_data_and_code_start_afresh(params, policy_files, tmp_path, caplog, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train(params, policy_files, always(tmp_path / "state"), tmp_path / "stopped", stop_at_four)
    key = training_key(params, 5, [policy_files.sft, policy_files.prompts, policy_files.reward])
    other = tmp_path / "prompts.jsonl"
    other.write_bytes(policy_files.prompts.read_bytes().replace(b"a", b"b", 1))
    for different in (
        training_key(params.model_copy(update={"beta": 0.06}), 5, [policy_files.sft, policy_files.prompts]),
        training_key(params, 6, [policy_files.sft, policy_files.prompts, policy_files.reward]),
        training_key(params, 5, [policy_files.sft, other, policy_files.reward]),
    ):
        assert different != key
    shutil.copytree(module.CODE / "policies", tmp_path / "code")
    monkeypatch.setattr(module, "CODE", tmp_path / "code")
    before = training_key(params, 5, [])
    (tmp_path / "code" / "ppo.py").write_text("mended")
    assert training_key(params, 5, []) != before
    monkeypatch.undo()
    section = params.model_copy(update={"beta": 0.06, "steps": 1})
    with caplog.at_level(logging.INFO):
        afresh = train(section, policy_files, always(tmp_path / "state"), tmp_path / "afresh")
    assert "starting afresh" in caplog.text
    assert afresh == train(section, policy_files, None, tmp_path / "whole")


def test_a_key_knows_bytes_and_names_but_no_places(params, policy_files, tmp_path):
    copy = shutil.copytree(policy_files.sft, tmp_path / "elsewhere")
    assert training_key(params, 0, [copy]) == training_key(params, 0, [policy_files.sft])
    (copy / "config.json").rename(copy / "settings.json")
    assert training_key(params, 0, [copy]) != training_key(params, 0, [policy_files.sft])


def test_half_written_checkpoints_are_passed_over(tmp_path, caplog):
    checkpoints = reopened(tmp_path)
    assert checkpoints.resume() is None
    for step in (1, 2, 3):
        checkpoints.offer(step, lambda step=step: {"step": step})
    newest = tmp_path / "key" / "000000003.pt"
    newest.write_bytes(newest.read_bytes()[:-40])
    (tmp_path / "key" / "000000004.partial").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        assert reopened(tmp_path).resume() == {"step": 2}
    assert "000000003.pt is unreadable" in caplog.text


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path):
    checkpoints = reopened(tmp_path)
    checkpoints.offer(1, lambda: {"step": 1})
    with pytest.raises(AttributeError):
        checkpoints.offer(2, lambda: {"step": lambda: 2})
    assert reopened(tmp_path).resume() == {"step": 1}


def test_nothing_is_written_before_it_is_due_and_nothing_stays_after_the_end(tmp_path):
    early = Checkpoints(tmp_path / "state", 3600, 0.05)
    early.open("key")
    early.offer(1, lambda: pytest.fail("not due"))
    due = reopened(tmp_path / "state")
    due.offer(1, lambda: {"step": 1})
    assert list((tmp_path / "state").rglob("*.pt"))
    due.clear()
    assert not (tmp_path / "state").exists()
    due.clear()


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), numpy.random.rand(), numpy.random.randn(), torch.rand(1).item()

    draw()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_the_stage_removes_its_checkpoints_when_its_results_are_saved(policy_files, tmp_path, monkeypatch):
    write_params(tmp_path / "params.yaml", tiny_params())
    params = load_params(tmp_path / "params.yaml")
    paths = Paths(tmp_path)
    shutil.copytree(policy_files.sft, paths.model("sft"))
    shutil.copytree(policy_files.reward, paths.model("reward"))
    paths.rows("prompts", "train").parent.mkdir(parents=True)
    shutil.copy(policy_files.prompts, paths.rows("prompts", "train"))
    shutil.copy(policy_files.prompts, paths.rows("prompts", "test"))
    monkeypatch.setattr(stage, "CHECKPOINTS", {"seconds": 0, "share": math.inf})
    seen = []

    def listen(figures, step):
        if "loss/policy_avg" in figures:
            seen.append(len(list(paths.state.rglob("*.pt"))))

    stage.run(params, paths, listen, "ppo")
    assert seen == [0, 1]
    assert (paths.model("policy", "ppo") / "model.safetensors").exists()
    assert not list(paths.state.rglob("*.pt"))
