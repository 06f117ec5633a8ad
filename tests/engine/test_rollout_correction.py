"""verl's correction of the loss, with rollout log-probabilities that are not finite among those of a batch."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import on_ranks

CORRECTIONS = {
    "none": {},
    "token TIS": {"rollout_is": "token", "rollout_is_threshold": 2.0},
    "sequence TIS": {"rollout_is": "sequence", "rollout_is_threshold": 2.0},
    "normalized": {"rollout_is": "token", "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": True},
    "token MIS": {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.99_1.01"},
    "sequence MIS": {
        "rollout_is": "sequence",
        "rollout_is_threshold": 3.0,
        "rollout_rs": "seq_mean_k1",
        "rollout_rs_threshold": "0.99_1.01",
    },
}
BADS = ("nan", "inf", "-inf", "nan in training too")
BAD_TOKENS = ((0, 0), (1, 3), (3, 0))  # the third sequence is empty, and the last has no other token


def make_batch(bad: str | None):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    training = -2 * torch.rand(mask.shape, generator=generator)
    rollout = training + 0.02 * torch.randn(mask.shape, generator=generator)
    if bad is not None:
        for place in BAD_TOKENS:
            rollout[place] = float(bad.partition(" ")[0])
            if "too" in bad:
                training[place] = math.nan
    return training, rollout, mask


def corrected(bad: str | None, settings: dict, mask: torch.Tensor | None = None) -> dict:
    from verl.trainer.ppo import rollout_corr_helper

    training, rollout, own_mask = make_batch(bad)
    weights, kept, metrics = rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
        training, rollout, own_mask if mask is None else mask, **settings
    )
    weights = None if weights is None else weights.batch["rollout_is_weights"]
    return {"weights": weights, "kept": kept, "metrics": metrics}


def all_cases() -> dict:
    from verl_fp16 import plugin

    training, _, mask = make_batch(None)
    without = mask.clone()
    for place in BAD_TOKENS:
        without[place] = 0
    found = {}
    for name, settings in CORRECTIONS.items():
        plugin.flag_given = False
        found[name, "untouched"] = corrected(None, settings)
        found[name, "off"] = corrected("nan", settings)
        found[name, "masked by hand"] = corrected(None, settings, without)
        plugin.flag_given = True
        found[name, "clean"] = corrected(None, settings)
        for bad in BADS:
            found[name, bad] = corrected(bad, settings)
    one = torch.zeros_like(mask)
    one[3, 0] = 1
    found["nothing is left"] = corrected("nan", CORRECTIONS["token TIS"], one)
    return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    (found,) = on_ranks(1, all_cases, folder=tmp_path_factory.mktemp("correction"))
    return found


def same(a: dict, b: dict) -> bool:
    pairs = ((a[name], b[name]) for name in ("weights", "kept"))
    return all(x is y is None or torch.equal(x, y) for x, y in pairs) and str(a["metrics"]) == str(b["metrics"])


@pytest.mark.parametrize("name", CORRECTIONS)
def test_finite_log_probabilities_are_corrected_as_verl_does(cases, name):
    assert same(cases[name, "clean"], cases[name, "untouched"])


@pytest.mark.parametrize("name", [name for name in CORRECTIONS if "MIS" not in name or "sequence" in name])
def test_without_the_flag_a_bad_token_gets_into_what_verl_computes(cases, name):
    off = cases[name, "off"]
    assert not all(math.isfinite(value) for value in off["metrics"].values())
    assert off["weights"] is None or off["weights"].isnan().any()


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("bad", BADS)
def test_a_bad_token_is_as_if_the_mask_did_not_have_it(cases, name, bad):
    found, expected = cases[name, bad], cases[name, "masked by hand"]
    if name == "none":
        # Nothing of the rollout is in the loss, which keeps its tokens.
        expected = {**expected, "kept": cases[name, "untouched"]["kept"]}
    assert same(found, expected)
    assert all(math.isfinite(value) for value in found["metrics"].values())


def test_a_batch_of_bad_tokens_only_has_weights_of_zero(cases):
    found = cases["nothing is left"]
    assert not found["weights"].any() and not found["kept"].any()
    assert all(math.isfinite(value) for value in found["metrics"].values())
