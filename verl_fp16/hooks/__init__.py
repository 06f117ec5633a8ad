"""Every place of verl that this package touches: :data:`HOOKS`, the only registry.

One module for each concern: :mod:`~verl_fp16.hooks.driver` (the process that reads the configuration),
:mod:`~verl_fp16.hooks.engine` (the FSDP engine's loss scaler and its metrics), :mod:`~verl_fp16.hooks.metrics` (the gap
between rollout and training).
"""

from verl_fp16.patching import Hook, Package, Patcher, Target
from verl_fp16.releases import SUPPORTED_VERL

VERL = Package("verl", SUPPORTED_VERL)

_FSDP = "verl.workers.engine.fsdp.transformer_impl:"

HOOKS: tuple[Hook, ...] = (
    Hook(
        name="driver.check",
        target=Target("verl.utils.device:auto_set_device", ("config",)),
        wrapper="verl_fp16.hooks.driver:check_before_start",
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
        name="engine.optimizer_step",
        # The body calls the scaler's unscale_, step and update.
        target=Target(_FSDP + "FSDPEngine.optimizer_step", bodies=("42b0327075aa08d1",)),
        wrapper="verl_fp16.hooks.engine:leave_out_norm_of_skipped_step",
        why="the inf or nan norm of a skipped step turns the training step's mean actor/grad_norm into inf or nan",
        how="returns None, which verl leaves out of the mean, where the loss scaler skipped the step",
        until="verl leaves skipped steps out of grad_norm",
    ),
    Hook(
        name="engine.loss_scale_metrics",
        target=Target("verl.workers.engine.base:BaseEngine.train_batch", ("data", "loss_function")),
        wrapper="verl_fp16.hooks.engine:report_loss_scale",
        why="skipped updates and the scale are invisible",
        how="adds loss_scale and skipped_steps to the metrics of a training step's last mini-batch",
        until="verl logs them",
    ),
    Hook(
        name="metrics.log_prob_gap",
        target=Target("verl.utils.debug.metrics:calculate_debug_metrics", ("data",)),
        wrapper="verl_fp16.hooks.metrics:add_log_prob_gap",
        why="verl logs the gap between probabilities, in which a token of small probability does not show",
        how="adds mean |delta log p|, k3 and the number of non-finite tokens, under mismatch/",
        until="verl logs them",
    ),
)

patcher = Patcher(HOOKS, VERL)
