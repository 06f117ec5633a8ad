"""Keys of recipes that the rule of test_recipe_keys.py does not hold for, each with the reason.

A test sees that none of them is stale.
"""

from __future__ import annotations

# No configuration of verl has these: parts of a free-form node, or nodes of ours. By pattern.
FREE = {
    "actor_rollout_ref.actor.optim.override_optimizer_config.*": "verl hands them to the optimizer's constructor",
    "actor_rollout_ref.actor.policy_loss.rollout_correction": "a field of PolicyLossConfig that its YAML leaves out",
    "reward.reward_kwargs.*": "the reward manager named dapo takes its settings from there",
    "ray_kwargs.ray_init.address": "verl hands ray_init to ray.init",
    "recipe.*": "ours: a run's name is made of it",
    "data_dir": "ours: the data's files are in it",
    "quickstart_dir": "ours: model, data and checkpoints are in it",
}

# Not in 0.8.0, where the key does nothing. By pattern.
NEW_IN_0_9 = {
    "algorithm.filter_groups.*": "no trainer of 0.8.0 filters groups; the guard refuses those who ask for it",
    "trainer.v1.sampler.custom_sampler.*": "of the v1 trainer; the CPU, where it is set, needs 0.9",
}

# No module of verl reads these by name.
HANDED_ON = {
    "actor_rollout_ref.actor.optim.override_optimizer_config.eps": "an argument of torch.optim.AdamW",
    "ray_kwargs.ray_init.address": "an argument of ray.init",
}

# The value is the one that is there already, in verl's own file or by an earlier file of the recipe.
REPEATED = {
    "actor_rollout_ref.actor.clip_ratio": "the papers' 0.2; verl reads it where clip_ratio_low and _high are not given",
    "actor_rollout_ref.actor.clip_ratio_low": "the papers' 0.2, beside clip_ratio_high, which differs",
    "actor_rollout_ref.actor.loss_agg_mode": "an algorithm names its mean: it may be put behind another one",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "an algorithm names its loss: it may be put behind another one",
    "algorithm.adv_estimator": "an algorithm names its advantages: it may be put behind another one",
    "algorithm.norm_adv_by_std_in_grpo": "DAPO's, where the other algorithms have the opposite",
    "actor_rollout_ref.actor.optim.lr": "the paper's, and what is changed most often",
    "critic.optim.lr": "what is changed most often, and ten times the actor's",
    "actor_rollout_ref.actor.use_kl_loss": "the paper has no KL penalty",
    "algorithm.use_kl_in_reward": "the paper has no KL penalty",
    "actor_rollout_ref.model.lora_alpha": "stated beside the rank, whose double it is",
    "actor_rollout_ref.model.target_modules": "stated beside the rank",
    "actor_rollout_ref.rollout.temperature": "the gap between training and rollout is that of the policy itself",
    "actor_rollout_ref.rollout.top_p": "the gap between training and rollout is that of the policy itself",
    "actor_rollout_ref.rollout.val_kwargs.n": "what a validation averages over",
    "actor_rollout_ref.rollout.val_kwargs.top_p": "stated beside do_sample and temperature, which differ",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "a multiple of the lengths above it",
    "data.max_prompt_length": "a part of rollout.max_model_len, which differs",
    "trainer.nnodes": "a scale says its whole size: it may be put behind another one",
    "trainer.n_gpus_per_node": "a scale says its whole size: it may be put behind another one",
    "reward.custom_reward_function.name": "the function beside its module, which differs",
    "trainer.save_freq": "sums are learned in minutes: nothing is saved",
    "trainer.val_before_train": "the quickstart's report begins with it",
}
