"""Every place of verl that this package touches: :data:`HOOKS`, the only registry.

One module for each concern: :mod:`~verl_fp16.hooks.entry`, :mod:`~verl_fp16.hooks.driver` (the process that reads the
configuration), :mod:`~verl_fp16.hooks.engine` (the FSDP engine's loss scaler and its metrics, FSDP1's gradient sync),
:mod:`~verl_fp16.hooks.checkpoint` (the scaler's state in checkpoints), :mod:`~verl_fp16.hooks.weight_sync` (what is
sent to the rollout, and its audit), :mod:`~verl_fp16.hooks.export` (the dtype of Hugging Face exports),
:mod:`~verl_fp16.hooks.mismatch` and :mod:`~verl_fp16.hooks.bypass` (the gap between rollout and training),
:mod:`~verl_fp16.hooks.metrics` (counts over a step), :mod:`~verl_fp16.hooks.trainer` (the read-back before the first
rollout, the seam of the training step), :mod:`~verl_fp16.hooks.file_log` (the metrics' file over a resume),
:mod:`~verl_fp16.hooks.rollout` (vLLM's part in the read-back and the audit).
"""

from verl_fp16.patching import Hook, Package, Patcher, Target
from verl_fp16.releases import SUPPORTED_VERL

VERL = Package("verl", SUPPORTED_VERL)

_TRAINER = "verl_fp16.hooks.trainer:"
_FILE_LOG = "verl_fp16.hooks.file_log:"
_FSDP = "verl.workers.engine.fsdp.transformer_impl:"
_MERGER = "verl.model_merger."

HOOKS: tuple[Hook, ...] = (
    Hook(
        name="driver.check",
        target=Target("verl.utils.device:auto_set_device", ("config",)),
        wrapper="verl_fp16.hooks.entry:check_before_start",
        why="verl accepts settings of ours that are wrong, and starts where our plugin is not in place",
        how="checks the node verl_fp16 and the plugin before Ray starts",
        until="never: it is ours",
    ),
    Hook(
        name="engine.loss_scaler",
        target=Target(_FSDP + "FSDPEngine._build_fsdp_module", ("module",), bodies=("7348512b38fdb91b",)),
        wrapper="verl_fp16.hooks.engine:use_loss_scaler",
        why="verl's ShardedGradScaler has fixed settings and disables itself on devices other than cuda",
        how="puts a LossScaler with the role's settings into engine.scaler; none in the reference policy",
        relies_on=(
            # Where the loss is scaled, and where autocast takes its dtype from.
            Target(
                _FSDP + "FSDPEngine.forward_backward_batch",
                bodies=("b83ab0043911b0ba", "1f195a5567cba2a6", "8f93e8e9bdc12521"),
            ),
            Target(
                _FSDP + "FSDPEngineWithLMHead.forward_step",
                bodies=("9220bffc75e4578b", "63952fbe417dc0fb", "113bf4153e862a98"),
            ),
        ),
        upstream="verl#6150",
        until="verl's scaler is configurable and observable",
    ),
    Hook(
        name="engine.zero_grad",
        target=Target(_FSDP + "FSDPEngine.optimizer_zero_grad"),
        wrapper="verl_fp16.hooks.engine:forget_dropped_update",
        why="what the scaler noted of a mini-batch that was dropped or failed would be held against the next one",
        how="has the scaler forget an update that was begun and not finished",
        until="verl's loop tells a scaler that an update is dropped",
    ),
    Hook(
        name="engine.forward_step",
        target=Target(
            _FSDP + "FSDPEngineWithLMHead.forward_step",
            ("micro_batch", "loss_function", "forward_only"),
            # Its output has the loss on the host, and log_probs or values in model_output.
            bodies=("9220bffc75e4578b", "63952fbe417dc0fb", "113bf4153e862a98"),
        ),
        wrapper="verl_fp16.hooks.engine:judge_forward_pass",
        why="a loss or log-probability that is not finite looks like an overflow of the gradients and halves the scale",
        how="hands loss and log-probabilities to the loss scaler",
        until="verl tells the two apart",
    ),
    Hook(
        name="engine.gradient_sync",
        # The body defers nothing where the micro-batch is the last.
        target=Target(
            _FSDP + "FSDPEngine._gradient_sync_context",
            ("is_last_micro_batch",),
            bodies=("5b5fa605fee985cf", "b592fee5b1019e93"),
        ),
        wrapper="verl_fp16.hooks.engine:reduce_after_every_micro_batch",
        why="under no_sync FSDP1 adds up the micro-batches' gradients in FP16, where the sum is rounded and overflows",
        how="treats each micro-batch as the last one, on FSDP1 in FP16",
        since="0.9",
        until="FSDP1 adds up unsharded gradients in FP32, or verl drops FSDP1",
    ),
    Hook(
        name="engine.optimizer_step",
        # The body calls the scaler's unscale_, clips, calls step and update, and returns the norm.
        target=Target(_FSDP + "FSDPEngine.optimizer_step", bodies=("42b0327075aa08d1",)),
        wrapper="verl_fp16.hooks.engine:step_if_finite",
        why=(
            "a norm that overflows makes an update of zeros, found_inf breaks fused optimizers, and the norm of a "
            "skipped step turns the mean actor/grad_norm into inf or nan"
        ),
        how=(
            "steps after the body, when fault and norm are on the host; records a skipped step, and returns None for "
            "it, which verl leaves out of the mean"
        ),
        until="verl decides the step on the host and leaves skipped ones out of grad_norm",
    ),
    Hook(
        name="engine.mini_batch",
        target=Target("verl.workers.engine.base:BaseEngine.train_batch", ("data", "loss_function")),
        wrapper="verl_fp16.hooks.engine:watch_mini_batch",
        why="skipped updates and the scale are invisible",
        how="adds loss_scale, skipped_steps and their like to the metrics of a training step's last mini-batch",
        until="verl logs them",
    ),
    Hook(
        name="engine.lr_schedule",
        target=Target(_FSDP + "FSDPEngine.lr_scheduler_step"),
        wrapper="verl_fp16.hooks.engine:hold_schedule_without_update",
        why="the learning rate moves on while the weights stand still",
        how="leaves the schedule alone after a training step without any applied update (loss_scale.hold_lr_on_skip)",
        until="verl does",
    ),
    Hook(
        name="worker.faulty_forward_metrics",
        target=Target(
            "verl.workers.engine_workers:TrainingWorker._postprocess_output",
            ("output", "global_token_num", "delta_time", "forward_only", "images_seqlens"),
        ),
        wrapper="verl_fp16.hooks.engine:leave_out_metrics_of_faulty_forward",
        why="the nan of one skipped mini-batch turns the training step's mean of every actor metric into nan",
        how="leaves out what is not finite of a mini-batch that was skipped for its forward pass",
        until="verl leaves skipped mini-batches out",
    ),
    Hook(
        name="engine.save_loss_scale",
        target=Target(
            _FSDP + "FSDPEngine.save_checkpoint",
            ("local_path", "hdfs_path", "global_step", "max_ckpt_to_keep", "kwargs"),
        ),
        wrapper="verl_fp16.hooks.checkpoint:save_with_loss_scale",
        why="the loss scale is lost on resume, and found again by skipping updates",
        how="writes the scaler's state beside the checkpoint, a JSON file for each rank",
        until="verl saves it",
    ),
    Hook(
        name="engine.load_loss_scale",
        target=Target(
            _FSDP + "FSDPEngine.load_checkpoint", ("local_path", "hdfs_path", "del_local_after_load", "kwargs")
        ),
        wrapper="verl_fp16.hooks.checkpoint:load_with_loss_scale",
        why="as engine.save_loss_scale",
        how="takes the state up again, the same on all ranks",
        until="verl loads it",
    ),
    Hook(
        name="engine.export",
        target=Target(_FSDP + "FSDPEngine.save_checkpoint", ("local_path",)),
        wrapper="verl_fp16.hooks.export:export_in_declared_dtype",
        why="verl tags a checkpoint's Hugging Face folder BF16 or FP32, whatever was trained, and it is evaluated so",
        how="tags config.json with the declared dtype, and notes it for the model merger in verl_fp16_export.json",
        until="verl exports in the rollout's dtype",
    ),
    Hook(
        name="checkpoint.full_state_dict",
        target=Target("verl.utils.fsdp_utils:get_fsdp_full_state_dict"),
        wrapper="verl_fp16.hooks.export:gather_in_declared_dtype",
        why="hf_model gets FP32 tensors under a BF16 tag, and is rounded, unchecked, by whoever loads it",
        how="casts what was gathered for hf_model to the declared dtype, and checks for overflow",
        until="verl exports in the rollout's dtype",
    ),
    Hook(
        name="checkpoint.save",
        # The body writes shards, optimizer and tokenizer before it gathers the weights for hf_model, with barriers.
        target=Target(
            "verl.utils.checkpoint.fsdp_checkpoint_manager:FSDPCheckpointManager.save_checkpoint",
            bodies=("2827866ca7bdb181", "1343b1874362be67"),
        ),
        wrapper="verl_fp16.hooks.export:keep_checkpoint_without_export",
        why="weights that overflow in hf_model would take the loss scale and the engine's clean end with them",
        how="leaves hf_model out on all ranks; engine.export raises the error when all else is written",
        until="as checkpoint.full_state_dict",
    ),
    Hook(
        name="merger.state_dict",
        # The body calls tensor.bfloat16() on each shard, on the calling thread.
        target=Target(
            _MERGER + "fsdp_model_merger:FSDPModelMerger._load_and_merge_state_dicts",
            bodies=("e5cfb7218ed22f6c", "425ecbc7b04ce9b0"),
        ),
        wrapper="verl_fp16.hooks.export:merge_in_declared_dtype",
        why="the merger rounds every weight to BF16",
        how="casts to the dtype in the checkpoint's verl_fp16_export.json instead, and checks for overflow",
        # Where the operation test compares, in the dtype that it asks the class of merger.model_class for.
        relies_on=(
            Target(_MERGER + "fsdp_model_merger:FSDPModelMerger._validate_state_dict", bodies=("89396c6244e4de5d",)),
        ),
        until="verl merges in the dtype of the checkpoint's config.json",
    ),
    Hook(
        name="merger.model_class",
        target=Target(_MERGER + "base_model_merger:BaseModelMerger.get_transformers_auto_model_class"),
        wrapper="verl_fp16.hooks.export:make_models_in_declared_dtype",
        why="the merger tags what it writes BF16, and its operation test loads the other side in BF16",
        how="makes the models of either in the dtype in the checkpoint's verl_fp16_export.json",
        relies_on=(
            Target(
                _MERGER + "base_model_merger:BaseModelMerger.save_hf_model_and_tokenizer",
                bodies=("5a67ada599f38269", "0282980e3359da20"),
            ),
        ),
        until="as merger.state_dict",
    ),
    Hook(
        name="engine.lora_masters",
        target=Target(_FSDP + "FSDPEngine._build_lora_module", ("module",)),
        wrapper="verl_fp16.hooks.engine:keep_adapters_in_float32",
        why="verl casts the adapters to the dtype of a base in half precision, in which small updates are lost",
        how="casts what is trained back to float32",
        until="verl keeps the adapters in float32",
    ),
    Hook(
        name="engine.send_weights",
        target=Target(
            _FSDP + "FSDPEngine.get_per_tensor_param",
            ("layered_summon", "base_sync_done", "kwargs"),
            # Every weight comes out of convert_weight_keys; a DTensor is gathered, and rounded to bfloat16 where the
            # release does so, and anything else is sent as it is.
            bodies=("fb02071d27ce32ef", "cc67315b2b977f0c"),
        ),
        wrapper="verl_fp16.hooks.weight_sync:send_in_rollout_dtype",
        why="float32 is sent where half of the bytes would do, and nobody sees what the receiver's rounding does",
        how="notes what goes into the stream, and on audited syncs digests it",
        until="verl sends in the rollout's dtype and checks it",
    ),
    Hook(
        name="engine.weight_images",
        target=Target("verl.utils.model:convert_weight_keys", ("state_dict", "model"), bodies=("72b543d90af3cbaa",)),
        wrapper="verl_fp16.hooks.weight_sync:make_images",
        why="merged LoRA, and all sharded weights in verl 0.8, are rounded to bfloat16; shards are gathered in float32",
        how="hands verl whole tensors, one at a time, whose shards were cast to the rollout's dtype before gathering",
        until="verl sends in the rollout's dtype",
    ),
    Hook(
        name="sync.audit",
        target=Target("verl.checkpoint_engine.base:CheckpointEngineManager.update_weights", ("global_steps",)),
        wrapper="verl_fp16.hooks.weight_sync:audit_update",
        why="nothing tells whether the rollout holds the weights that were trained, nor what a sync costs",
        how="compares what was sent, what arrived, what is held and what it computes; adds sync/ to the metrics",
        until="never: it is ours",
    ),
    Hook(
        name="mismatch.measure",
        target=Target("verl.utils.debug.metrics:calculate_debug_metrics", ("data",)),
        wrapper="verl_fp16.hooks.mismatch:add_log_prob_gap",
        why=(
            "verl logs the gap between probabilities, in which a token of small probability does not show, and nothing "
            "of how it grows with length"
        ),
        how="adds the statistics of verl_fp16.mismatch.definitions, under mismatch/",
        until="verl logs them",
    ),
    Hook(
        name="mismatch.sample_ids",
        target=Target("verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_old_log_prob", ("batch", "metrics")),
        wrapper="verl_fp16.hooks.mismatch:remember_sample_ids",
        why="what verl compares carries no name of its samples, and a token's evidence would lead nowhere",
        how="notes the names of the batch's samples while it is compared",
        since="0.9",
        until="calculate_debug_metrics gets them",
    ),
    Hook(
        name="mismatch.responses",
        target=Target("verl.trainer.ppo.metric_utils:compute_data_metrics", ("batch",)),
        wrapper="verl_fp16.hooks.mismatch:remember_responses",
        why="where logits are NaN, the rollout repeats one token to the end of the response, and verl does not tell",
        how="notes the step's responses, in which the watch looks for runs of one token",
        until="never: it is ours",
    ),
    Hook(
        name="mismatch.correction",
        target=Target(
            "verl.trainer.ppo.rollout_corr_helper:compute_rollout_correction_and_rejection_mask",
            ("old_log_prob", "rollout_log_prob", "response_mask", "rollout_rs"),
        ),
        wrapper="verl_fp16.hooks.mismatch:leave_out_of_correction",
        why="one rollout log-probability that is not finite makes NaN of the weights that correct the loss",
        how="masks such a token out of correction and loss; its gap is counted as mismatch/nonfinite_rollout",
        until="verl leaves such tokens out",
    ),
    Hook(
        name="mismatch.bypass_forward",
        target=Target(
            _FSDP + "FSDPEngineWithLMHead.forward_step",
            ("micro_batch", "loss_function", "forward_only"),
            bodies=("9220bffc75e4578b", "63952fbe417dc0fb", "113bf4153e862a98"),
        ),
        wrapper="verl_fp16.hooks.bypass:measure_first_mini_batch",
        why="in bypass mode verl takes the rollout's log-probabilities for its own, and the gap reads 0",
        how="takes the log-probabilities of the first mini-batch's training forward",
        until="verl measures the gap in bypass mode",
    ),
    Hook(
        name="mismatch.bypass_metrics",
        target=Target("verl.workers.engine.base:BaseEngine.train_batch", ("data", "loss_function")),
        wrapper="verl_fp16.hooks.bypass:log_first_mini_batch",
        why="as mismatch.bypass_forward",
        how="adds its statistics, merged over micro-batches and ranks, under mismatch_first_update/",
        until="as mismatch.bypass_forward",
    ),
    Hook(
        name="mismatch.bypass_loss",
        target=Target("verl.trainer.ppo.core_algos:get_policy_loss_fn", ("name",)),
        wrapper="verl_fp16.hooks.bypass:leave_out_of_policy_loss",
        why="in bypass mode a rollout log-probability that is not finite goes into the ratio of every policy loss",
        how="masks such a token out of the policy loss",
        until="verl leaves such tokens out",
    ),
    Hook(
        name="metrics.skips_of_a_step",
        target=Target("verl.trainer.ppo.v1.utils:MetricsAggregator._init_aggregation_rules"),
        wrapper="verl_fp16.hooks.metrics:add_up_skips",
        why="where a step has several updates of the trainer (separate_async), verl averages counts and sums totals",
        how="has the counts of a step added up, and scale and totals taken as they are at its end",
        since="0.9",
        until="verl aggregates as the metric says",
    ),
    Hook(
        name="metrics.skips_of_a_step_in_fully_async",
        target=Target("verl.experimental.fully_async_policy.detach_utils:MetricsAggregator._init_aggregation_rules"),
        wrapper="verl_fp16.hooks.metrics:add_up_skips",
        why="as metrics.skips_of_a_step, for the fully asynchronous trainer",
        how="as metrics.skips_of_a_step",
        until="verl aggregates as the metric says",
    ),
    Hook(
        name="trainer.fit",
        target=Target("verl.trainer.ppo.v1.trainer_base:PPOTrainer.fit"),
        wrapper=_TRAINER + "fit_what_was_declared",
        why="verl says nowhere in which precision its processes run, nor that one of them lacks this package",
        how="asks every process before the first validation or rollout, and stops the run where one differs",
        since="0.9",
        until="never: it is ours",
    ),
    Hook(
        name="trainer.legacy_fit",
        target=Target("verl.trainer.ppo.ray_trainer:RayPPOTrainer.fit"),
        wrapper=_TRAINER + "fit_what_was_declared",
        why="as trainer.fit, for trainer.use_v1=false and verl 0.8.0",
        how="as trainer.fit",
        until="verl drops the legacy trainer",
    ),
    Hook(
        name="trainer.one_step_off_fit",
        target=Target("verl.experimental.one_step_off_policy.ray_trainer:OneStepOffRayTrainer.fit"),
        wrapper=_TRAINER + "fit_what_was_declared",
        why="as trainer.fit, for the one-step-off trainer, which has a loop of its own",
        how="as trainer.fit",
        until="verl drops that trainer",
    ),
    Hook(
        name="trainer.log_step",
        # The only place that the loops of all trainers pass once a step, with all metrics of it.
        target=Target("verl.utils.tracking:Tracking.log", ("data", "step", "backend")),
        wrapper=_TRAINER + "log_training_step",
        why="verl has no place for what should watch each training step, add to its log, or end the run",
        how="calls the observers of verl_fp16.training_step with each training step that is logged",
        until="verl has callbacks for a training step",
    ),
    Hook(
        name="trainer.saved_step",
        target=Target("verl.trainer.ppo.v1.trainer_base:PPOTrainer._save_checkpoint"),
        wrapper=_TRAINER + "remember_saved_step",
        why="an observer's checkpoint of a step that verl has just saved would be written twice",
        how="notes on the trainer which step was saved",
        since="0.9",
        until="verl has callbacks for a training step",
    ),
    Hook(
        name="trainer.legacy_saved_step",
        target=Target("verl.trainer.ppo.ray_trainer:RayPPOTrainer._save_checkpoint"),
        wrapper=_TRAINER + "remember_saved_step",
        why="as trainer.saved_step",
        how="as trainer.saved_step",
        until="verl drops the legacy trainer",
    ),
    Hook(
        name="trainer.file_log",
        target=Target(
            "verl.utils.tracking:FileLogger.__init__",
            ("project_name", "experiment_name"),
            bodies=("fd1f2c6b9e90e1c5",),  # replaced, where a trainer with the flag is running
        ),
        wrapper=_FILE_LOG + "open_without_truncating",
        why="verl empties the file of its file logger when a run resumes, and all that was logged before is lost",
        how="opens the file for appending, and leaves it to trainer.file_log_begin what stays of it",
        until="verl goes on in the file when a run resumes",
    ),
    Hook(
        name="trainer.file_log_begin",
        # The body writes one line of JSON to self.fp, which is opened anew where the file was replaced.
        target=Target("verl.utils.tracking:FileLogger.log", ("data", "step"), bodies=("fd2d61a7b77e8d30",)),
        wrapper=_FILE_LOG + "begin_with_first_log",
        why="as trainer.file_log; whether a run resumes is not known before the first log",
        how=(
            "empties the file of a fresh run; in that of a resumed one drops later steps and broken lines, and marks "
            "the resume"
        ),
        until="as trainer.file_log",
    ),
    Hook(
        name="trainer.resumed_step",
        target=Target("verl.trainer.ppo.v1.trainer_base:PPOTrainer._load_checkpoint"),
        wrapper=_FILE_LOG + "remember_resumed_step",
        why="no trainer says afterwards whether it resumed, and from which step",
        how="notes on the trainer the step that verl set",
        since="0.9",
        until="as trainer.file_log",
    ),
    Hook(
        name="trainer.legacy_resumed_step",
        target=Target("verl.trainer.ppo.ray_trainer:RayPPOTrainer._load_checkpoint"),
        wrapper=_FILE_LOG + "remember_resumed_step",
        why="as trainer.resumed_step, for the legacy trainer and the one-step-off one",
        how="as trainer.resumed_step",
        until="as trainer.file_log",
    ),
    Hook(
        name="rollout.worker_report",
        target=Target("verl.workers.rollout.vllm_rollout.utils"),
        wrapper="verl_fp16.hooks.rollout:worker_answers",
        why="a vLLM worker's precision and weights can be read in its own process only",
        how=(
            "adds methods to the class that vLLM mixes into its worker; on audited syncs, digests what arrived and "
            "follows where vLLM's loaders copy it"
        ),
        relies_on=(
            Target(
                "verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension._update_weights",
                ("weights", "peft_config", "base_sync_done"),
            ),
        ),
        until="never: it is ours",
    ),
    Hook(
        name="rollout.server_report",
        target=Target("verl.workers.rollout.vllm_rollout.vllm_async_server"),
        wrapper="verl_fp16.hooks.rollout:server_answers",
        why="verl's collective_rpc drops what vLLM's workers answer",
        how="adds methods to verl's vLLM server that return it, and that ask it for the probe's log-probabilities",
        until="verl's server returns what its workers answer",
    ),
)

patcher = Patcher(HOOKS, VERL)
