"""An observer as a user would write one; verl imports it in the trainer's process through ``model.external_lib``."""

import os

from verl_fp16.training_step import StepRecord, observe


@observe
def watch(step: StepRecord) -> None:
    step.metrics["seam/step"] = float(step.number)
    if str(step.number) in os.environ["SEAM_SAVE_AT"].split(","):
        step.save_checkpoint()
    if str(step.number) == os.environ["SEAM_STOP_AT"]:
        step.stop("the test has seen enough")
