"""Supervised fine-tuning on a tiny random model: what is trained, what is written, and that it is the same twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.curves import no_log
from rlhf.data.formats import Row, with_ids, write_rows
from rlhf.encoding import encode_answer, read_answer
from rlhf.errors import UserError
from rlhf.ledger import Ledger
from rlhf.models import load_causal, load_tokenizer, save_model
from rlhf.params import AdapterParams, LedgerParams, SFTParams
from rlhf.pretraining import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_rows(count: int, conversational: bool = False) -> list[Row]:
    rows: list[Row] = []
    for number in range(count):
        prompt, completion = f"Ben has {number} pens.\n", f"<think> {number}</think><answer> {number}</answer>"
        if conversational:
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        rows.append({"prompt": prompt, "completion": completion, "truth_flaw": "right"})
    return with_ids(rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    texts = [row["prompt"] + row["completion"] for row in make_rows(40)]
    tokenizer: Any = train_tokenizer(texts, 320, 64)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **names, pad_token_id=tokenizer.pad_token_id))
    save_model(model, tokenizer, folder)
    return folder


def make_section(**changes: Any) -> SFTParams:
    values: dict[str, Any] = {
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "warmup_share": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 100.0,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "precision": "fp32",
        "adapter": None,
        "epochs": 1.0,
        "max_length": 64,
        "evaluations": 2,
        "patience": 5,
        "min_stop_rate": 0.0,
    }
    return SFTParams(**{**values, **changes})


LORA = AdapterParams(rank=4, alpha=8, dropout=0.0, target_modules="all-linear", quantise=None)


def train(
    folder: Path,
    base: Path,
    section: SFTParams,
    rows: list[Row] | None = None,
    log: Any = no_log,
    on_too_long: Any = "truncate",
) -> Any:
    from rlhf.sft import SFTFiles, train_sft

    write_rows(folder / "train.jsonl", make_rows(12) if rows is None else rows)
    write_rows(folder / "test.jsonl", make_rows(4))
    files = SFTFiles(base, folder / "train.jsonl", folder / "test.jsonl", folder / "model", folder / "report")
    return train_sft(section, files, 0, log, Ledger(LedgerParams(on_too_long=on_too_long, max_lost_share=1.0)))


def hash_folder(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_parameter_moves_and_the_outputs_are_the_same_twice(tmp_path: Path, base: Path) -> None:
    seen: dict[str, list[float]] = {}

    def log(metrics: Any, step: int) -> None:
        for name, value in metrics.items():
            assert isinstance(value, float)
            seen.setdefault(name, []).append(step)

    metrics = train(tmp_path / "a", base, make_section(), log=log)
    assert metrics == train(tmp_path / "b", base, make_section())
    assert hash_folder(tmp_path / "a" / "model") == hash_folder(tmp_path / "b" / "model")
    assert hash_folder(tmp_path / "a" / "report") == hash_folder(tmp_path / "b" / "report")
    before, after = load_causal(base).state_dict(), load_causal(tmp_path / "a" / "model").state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"]
    assert (metrics["steps"], metrics["ledger"]["sft/train"]["used"], metrics["ledger"]["sft/test"]["used"]) == (
        3,
        12,
        4,
    )
    assert seen["held_out_loss"] == [0, 2, 3, 3]
    assert seen["loss"] == [3]
    assert metrics["loss"] > 0
    assert not any("time" in name or "second" in name for name in seen)
    assert not list((tmp_path / "a" / "model").glob("*.bin"))
    samples = json.loads((tmp_path / "a" / "report" / "samples.json").read_text())
    assert samples[0]["prompt"] == "Ben has 0 pens.\n"


def test_four_small_batches_equal_one_large(tmp_path: Path, base: Path) -> None:
    """Rows of different length: a mean of means over batches would differ from the mean over tokens."""
    rows = make_rows(8)
    for row in rows[::2]:
        row["completion"] += " and so on"
    train(tmp_path / "large", base, make_section(batch_size=4), rows)
    train(tmp_path / "small", base, make_section(batch_size=1, gradient_accumulation_steps=4), rows)
    large, small = (load_causal(tmp_path / name / "model").state_dict() for name in ("large", "small"))
    for name in large:
        torch.testing.assert_close(large[name], small[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_is_merged_into_the_saved_model(tmp_path: Path, base: Path, precision: str) -> None:
    metrics = train(tmp_path, base, make_section(adapter=LORA, precision=precision))
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"]
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    merged = load_causal(tmp_path / "model")
    start = load_causal(base)
    changed = [name for name, value in start.state_dict().items() if not torch.equal(value, merged.state_dict()[name])]
    assert changed
    assert all("proj" in name for name in changed)


def test_nf4_without_a_gpu_is_refused(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="set adapter.quantise to null"):
        train(tmp_path, base, make_section(adapter=LORA.model_copy(update={"quantise": "nf4"})))


def test_the_weights_of_the_best_step_come_back_and_patience_ends_training(tmp_path: Path, base: Path) -> None:
    """A learning rate that destroys the model: the first evaluation is the best, and training stops early."""
    section = make_section(learning_rate=1.0, epochs=10.0, evaluations=30, patience=2)
    metrics = train(tmp_path, base, section)
    assert metrics["steps"] < 30
    assert metrics["best_step"] == metrics["steps"] - 2
    losses = [line.split(",") for line in (tmp_path / "report" / "curves.csv").read_text().splitlines()]
    column = losses[0].index("held_out_loss")
    at_best = next(float(line[column]) for line in losses[1:] if line[0] == str(metrics["best_step"]))
    assert metrics["held_out_loss"] == pytest.approx(at_best, rel=1e-4)


def test_figures_go_to_the_log_and_are_not_printed(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, base, make_section())
    said = capsys.readouterr()
    assert "loss" not in said.out + said.err


def test_loss_counts_the_completion_and_its_end_only(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    row = make_rows(3)[2]
    reading = read_answer(tokenizer, row, "completion")
    (ids,), (learnt,) = reading.sequences, reading.answers
    assert tokenizer.decode(learnt) == row["completion"] + "<eos>"
    assert tokenizer.decode(ids) == row["prompt"] + row["completion"] + "<eos>"


def test_conversations_end_where_the_template_ends_the_turn(tmp_path: Path, base: Path) -> None:
    tokenizer = load_tokenizer(base)
    row = make_rows(1, conversational=True)[0]
    reading = read_answer(tokenizer, row, "completion")
    assert tokenizer.decode(reading.answers[0]) == "<think> 0</think><answer> 0</answer><eos>\n"
    assert encode_answer(tokenizer, row["prompt"], row["completion"]) == reading.sequences[0]
    assert encode_answer(tokenizer, row["prompt"], row["completion"][0]["content"]) == reading.sequences[0]
    metrics = train(tmp_path, base, make_section(), make_rows(4, conversational=True))
    assert metrics["ledger"]["sft/train"]["used"] == 4


def test_conversations_without_a_template_are_refused(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        read_answer(tokenizer, make_rows(1, conversational=True)[0], "completion")


def test_long_rows_are_counted_and_rows_of_prompt_alone_left_out(tmp_path: Path, base: Path) -> None:
    rows = make_rows(6)
    rows[0]["completion"] = "one two three " * 30
    rows[1]["prompt"] = "one two three " * 30
    account = train(tmp_path, base, make_section(max_length=40), rows)["ledger"]["sft/train"]
    assert (account["read"], account["used"], account["truncated"], account["without_end_token"]) == (6, 5, 1, 1)
    assert account["dropped"] == {"nothing_trainable": 1}
    account = train(tmp_path, base, make_section(max_length=40), rows, on_too_long="drop")["ledger"]["sft/train"]
    assert (account["used"], account["truncated"], account["dropped"]) == (4, 0, {"too_long": 2})
    report = json.loads((tmp_path / "report" / "ledger.json").read_text())
    assert report["sft/train"]["examples"] == {"too_long": [rows[0]["id"], rows[1]["id"]]}


def test_what_is_learnt_is_shown_with_its_special_tokens(tmp_path: Path, base: Path) -> None:
    rows = make_rows(4, conversational=True)
    metrics = train(tmp_path, base, make_section(), rows)
    shown = json.loads((tmp_path / "report" / "trained_on.json").read_text())
    assert [one["row"] for one in shown] == [row["id"] for row in rows[:3]]
    assert shown[0]["given"] == "<user>Ben has 0 pens.\n<eos>\n<assistant>"
    assert shown[0]["learnt"] == "<think> 0</think><answer> 0</answer><eos>\n"
    assert metrics["template"]["chat_template"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16]


def test_the_end_token_is_learnt_where_it_is_the_padding_too(tmp_path: Path, base: Path) -> None:
    """Rows of different length in one batch: what pads them must not hide the token that ends them."""
    tokenizer, model = load_tokenizer(base), load_causal(base)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.eos_token_id
    save_model(model, tokenizer, tmp_path / "base")
    rows = make_rows(8)
    for row in rows[::2]:
        row["completion"] += " and so on"
    for name, start in (("own", base), ("shared", tmp_path / "base")):
        train(tmp_path / name, start, make_section(batch_size=8), rows)
    own, shared = (load_causal(tmp_path / name / "model").state_dict() for name in ("own", "shared"))
    assert all(torch.equal(own[name], shared[name]) for name in own)


def test_a_model_that_does_not_stop_is_refused_after_its_report(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match=r"only \d+% of 4 answers end by themselves, less than sft.min_stop_rate 1"):
        train(tmp_path, base, make_section(min_stop_rate=1.0, learning_rate=1e-6))
    assert (tmp_path / "report" / "samples.json").exists()
    assert (tmp_path / "model" / "config.json").exists()


def test_a_limit_that_cuts_every_end_token_is_refused(tmp_path: Path, base: Path) -> None:
    length = len(load_tokenizer(base)(make_rows(1)[0]["prompt"])["input_ids"]) + 1
    with pytest.raises(UserError, match="would never learn to stop"):
        train(tmp_path, base, make_section(max_length=length))
    with pytest.raises(UserError, match="no demonstration that fits"):
        train(tmp_path, base, make_section(max_length=2))


def test_truth_columns_do_not_change_the_model(tmp_path: Path, base: Path) -> None:
    rows = make_rows(12)
    poisoned = [{**row, "truth_flaw": "poison", "truth_other": number} for number, row in enumerate(rows)]
    train(tmp_path / "a", base, make_section(), rows)
    train(tmp_path / "b", base, make_section(), poisoned)
    assert hash_folder(tmp_path / "a" / "model") == hash_folder(tmp_path / "b" / "model")
