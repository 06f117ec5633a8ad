"""A small arithmetic task and base model on which a GRPO run shows learning within minutes on a CPU.

``task`` holds the questions, the reward and verl's parquet files, ``tokenizer`` the byte-level vocabulary and chat
template, ``base_model`` the supervised training that leaves a model right on a part of its answers.
"""
