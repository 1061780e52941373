"""Rewards of answers without our reward model: by rule, by execution, by a classifier, by a function of one's own.

A reward function has the signature of TRL's: `f(prompts, completions, **columns)`, where completions are texts or lists
of messages and columns are lists beside the prompts; it gives one finite number per completion. docs/rewards.md says
what each of them pays and how it can be fooled.
"""
