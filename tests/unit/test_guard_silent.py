"""The rules of guard/algorithm.py and guard/silent.py: settings that nobody reads, or that change a run in silence."""

from __future__ import annotations

from guard_configurations import ROLLOUT, check

FILTER = "algorithm.filter_groups"
SAMPLER = "trainer.v1.sampler.custom_sampler"


def test_group_filtering_is_refused_where_no_trainer_filters():
    """Where the setting is read, read in the source: ``_build_replay_buffer`` of the v1 trainer, from 0.9.0 on."""
    filtering = (f"++{FILTER}.enable=true",)
    assert check(filtering) == []
    for version, more in (
        ("0.8.0", ()),
        ("0.9.1", ("trainer.use_v1=false",)),
        ("0.9.1", (f"{SAMPLER}.path=mine.py", f"{SAMPLER}.name=Mine")),
    ):
        (finding,) = check((*filtering, *more), verl=version)
        assert (finding.severity, finding.key) == ("error", f"{FILTER}.enable"), more
        assert check((*filtering, *more, *finding.fix), verl=version) == []
        assert check((f"++{FILTER}.enable=false", *more), verl=version) == []
    for half in (f"{SAMPLER}.path=mine.py", f"{SAMPLER}.name=Mine", f"{SAMPLER}={{path: mine.py, name: ''}}"):
        assert check((*filtering, half)) == [], "verl takes a custom sampler of a path and a name, or its own"


def test_a_bound_on_generated_batches_that_nobody_reads_is_warned_of():
    asked = (f"++{FILTER}.enable=true", f"{FILTER}.max_num_gen_batches=10")
    (finding,) = check(asked)
    assert (finding.severity, finding.key) == ("warning", f"{FILTER}.max_num_gen_batches")
    assert check((*asked, *finding.fix)) == []


def test_a_group_of_one_is_warned_of_where_something_is_trained():
    alone = (f"{ROLLOUT}.n=1", "algorithm.adv_estimator=reinforce_plus_plus_baseline")
    assert [finding.key for finding in check(alone)] == [f"{ROLLOUT}.n"]
    assert check((*alone, "++trainer.val_only=true")) == []
    assert check((f"{ROLLOUT}.n=1", "algorithm.adv_estimator=gae")) == []


def test_a_chat_template_that_0_8_does_not_see_is_refused_there_alone():
    template = ("actor_rollout_ref.model.custom_chat_template=mine",)
    assert check(template, verl="0.9.0") == []
    (finding,) = check(template, verl="0.8.0")
    assert (finding.severity, finding.key) == ("error", "actor_rollout_ref.model.custom_chat_template")
    assert check((*template, *finding.fix), verl="0.8.0") == []


def test_a_buffer_longer_than_an_answer_is_refused_before_its_workers_stop():
    reward = "++reward.reward_kwargs={max_resp_len: 1024, overlong_buffer_cfg: {enable: true, len: %d}}"
    dapo = "reward.reward_manager.name=dapo"
    assert check((reward % 1024, dapo)) == []
    assert check((reward % 1025,)) == [], "another reward manager does not read it"
    (finding,) = check((reward % 1025, dapo))
    assert (finding.severity, finding.key) == ("error", "reward.reward_kwargs.overlong_buffer_cfg.len")
    assert check((reward % 1025, dapo, *finding.fix)) == []
