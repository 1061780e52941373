"""TRL's last PPOTrainer (1.12.0, `trl.experimental.ppo`) on a job of benchmarks/ppo.py, in an environment of its own.

    PEER/bin/python benchmarks/trl_ppo.py JOB.json

Needs torch, trl==1.12.0 and transformers only. Writes `result.json` and the policy's snapshots beside the job.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]

from ppo_measures import Measures


class Watch(TrainerCallback):
    """Times every rollout with its updates, keeps the figures, and saves the policy where it is asked for."""

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        self.job = job
        self.folder = folder
        self.measures = Measures()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.measures.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.measures.rows.append(logs)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.measures.stop()
        if self.job["snapshot_every"] and state.global_step % self.job["snapshot_every"] == 0:
            model.policy.save_pretrained(self.folder / f"step-{state.global_step:06}")
        self.measures.start()


def configure(job: dict[str, Any], folder: Path) -> PPOConfig:
    """The job's settings under TRL's names.

    One batch is one micro batch: with gradient accumulation TRL takes an update per accumulated batch instead of one
    per minibatch. `max_grad_norm` is asked for as on the other side; this trainer does not read it.
    """
    return PPOConfig(
        output_dir=str(folder / "trainer"),
        seed=job["seed"],
        per_device_train_batch_size=job["batch_size"] // job["processes"],
        gradient_accumulation_steps=1,
        num_mini_batches=job["minibatches"],
        num_ppo_epochs=job["update_epochs"],
        local_rollout_forward_batch_size=job["batch_size"] // job["processes"],
        total_episodes=job["batch_size"] * job["steps"],
        response_length=job["max_new_tokens"],
        stop_token="eos",
        temperature=job["temperature"],
        missing_eos_penalty=job["missing_eos_penalty"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=job["max_grad_norm"],
        kl_coef=job["beta"],
        kl_estimator="k1",
        cliprange=job["clip_range"],
        cliprange_value=job["value_clip_range"],
        vf_coef=job["value_coefficient"],
        gamma=job["gamma"],
        lam=job["gae_lambda"],
        num_sample_generations=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


def main() -> None:
    """Train, and write what was measured."""
    path = Path(sys.argv[1])
    job, folder = json.loads(path.read_text()), path.parent
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in Path(job["prompts"]).read_text().splitlines()]
    rows = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts]
    scorer = {"num_labels": 1, "dtype": "float32"}
    watch = Watch(job, folder)
    trainer = PPOTrainer(
        args=configure(job, folder),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32"),
        ref_model=AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32"),
        reward_model=AutoModelForSequenceClassification.from_pretrained(job["reward"], **scorer),
        value_model=AutoModelForSequenceClassification.from_pretrained(job["reward"], **scorer),
        train_dataset=Dataset.from_list(rows),
        # This trainer sets up its loader of held-out prompts whether it uses them or not.
        eval_dataset=Dataset.from_list(rows[: job["batch_size"]]),
        callbacks=[watch],
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        watch.measures.write(folder)


if __name__ == "__main__":
    main()
