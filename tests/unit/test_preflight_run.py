"""The command preflight with both halves, on small models that can be run, with planted faults."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from preflight_models import make_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from verl_fp16.cli import preflight_run as report
from verl_fp16.cli.app import app
from verl_fp16.loss_scale_settings import LossScaleSettings
from verl_fp16.preflight import run as running
from verl_fp16.preflight import run_verdict
from verl_fp16.preflight.activations import Gradients, Tally
from verl_fp16.preflight.loss_scale_search import LossScale
from verl_fp16.preflight.passes import MICRO_BATCH_TOKENS, Measured
from verl_fp16.preflight.verdict import Verdict

TIMEOUT_S = 120
Tensors = dict[str, torch.Tensor]


def command(path: Path, *options: str):
    return CliRunner().invoke(app, ["preflight", str(path), *options])


def copied(model: Path, folder: Path, change: Callable[[Tensors], object] = lambda tensors: None, **config) -> Path:
    """A copy whose weights ``change`` has changed in place."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def told_on_stderr(result) -> str:
    """The one line that is no progress."""
    (line,) = (line for line in result.stderr.splitlines() if not re.match("verl-fp16: (reading|running) ", line))
    return line


def overflow_forward(tensors: Tensors) -> None:
    """Layer 1's gate and up projections are 40 times as large, and its down projection 10,000 times."""
    for name, factor in (("gate_proj", 40), ("up_proj", 40), ("down_proj", 1e4)):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= factor


def overflow_backward(tensors: Tensors) -> None:
    """A small embedding before a normalization: its gradient is large."""
    tensors["model.embed_tokens.weight"] *= 1e-2


def test_a_model_that_fits(tiny_model):
    result = command(tiny_model)
    assert (result.exit_code, result.exception) == (0, None) or isinstance(result.exception, SystemExit)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tensor\tshape")
    columns = "module\tkind\tmax |x|\theadroom\tinf, nan\tgradient\tweight gradient\tgradient zero"
    table = lines[lines.index(columns) + 1 :][: report.WORST]
    assert all(line.count("\t") == columns.count("\t") for line in table)
    assert "the default, 2^16, does not overflow: nothing to set" in lines
    assert "FIT for FP16, on generated tokens (--prompts FILE: on yours)" in lines
    assert "4 sequences of 64 random tokens (seed 0) and 6 built-in texts through the chat template" in result.stdout
    assert re.search(r"^verl-fp16: running [\d,]+ tokens forward and backward on cpu$", result.stderr, re.M)
    every = command(tiny_model, "--all").stdout
    assert every.count("Qwen3RMSNorm") > result.stdout.count("Qwen3RMSNorm")
    assert "shown are the 12 worst" in result.stdout and "12 worst" not in every


def test_json_has_everything(tiny_model):
    result = command(tiny_model, "--json", "--seed", "7")
    found = json.loads(result.stdout)
    run = found["run"]
    assert (found["verdict"], found["weights_verdict"], found["reasons"], result.exit_code) == ("FIT", "FIT", [], 0)
    assert "(seed 7)" in run["source"]
    names = [module["name"] for module in run["modules"]]
    order = ["model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.1", "model.norm", "lm_head"]
    assert [name for name in names if name in order] == order
    for module in run["modules"]:
        assert module["headroom"] == pytest.approx(65504 / module["max_abs"])
    assert {p["name"] for p in run["parameters"]} == {tensor["name"] for tensor in found["tensors"]}
    scale = run["loss_scale"]
    assert scale["default"] == LossScaleSettings().init == scale["advised"]
    passes = {row["scale"]: row["non_finite"] for row in scale["passes"]}
    assert passes[scale["largest"]] == 0 < passes[2 * scale["largest"]]
    assert scale["verified"] is True
    largest = max(scale["gradient_max_abs"], *(p["gradient_max_abs"] for p in run["parameters"]))
    assert largest * scale["largest"] <= 65504 < largest * scale["largest"] * 2.01


def test_the_same_call_gives_the_same_numbers(tiny_model):
    one, other = (json.loads(command(tiny_model, "--json").stdout)["run"] for _ in range(2))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_layer_whose_activations_overflow_is_named(tiny_model, tmp_path):
    path = copied(tiny_model, tmp_path / "model", overflow_forward)
    result = command(path, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["verdict"], found["weights_verdict"]) == (2, "UNFIT", "FIT")
    assert found["run"]["culprits"] == ["model.layers.1.mlp.down_proj"]
    assert "it arises in model.layers.1.mlp.down_proj (Linear, " in found["reasons"][0]["why"]
    assert found["run"]["loss_scale"] is None
    bad = [module["name"] for module in found["run"]["modules"] if module["non_finite"]]
    assert bad[0] == "model.layers.1.mlp.down_proj" and "lm_head" in bad and "model.layers.0" not in bad
    shown = command(path).stdout
    assert "loss scale: not looked for, since the forward pass is not finite" in shown
    assert re.search(r"^module\t.*\nmodel\.layers\.1\.mlp\.down_proj\t", shown, re.M), "it is at the top of the table"


def test_a_weight_that_is_nan_is_told_by_both_halves(tiny_model, tmp_path):
    def plant(tensors):
        tensors["model.layers.0.self_attn.o_proj.weight"][3, 5] = math.nan

    result = command(copied(tiny_model, tmp_path / "model", plant), "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["weights_verdict"]) == (2, "UNFIT")
    assert [reason["verdict"] for reason in found["reasons"]] == ["UNFIT", "UNFIT"]
    assert "1 weight is inf or nan" in found["reasons"][0]["why"]
    assert "it arises in model.layers.0.self_attn.o_proj" in found["reasons"][1]["why"]


def test_where_only_the_backward_pass_overflows_it_says_which_scale_to_set(tiny_model, tmp_path):
    path = copied(tiny_model, tmp_path / "model", overflow_backward)
    result = command(path)
    found = json.loads(command(path, "--json").stdout)
    scale = found["run"]["loss_scale"]
    assert scale["largest"] < scale["default"]
    assert scale["advised"] == scale["largest"]
    passes = {row["scale"]: row for row in scale["passes"]}
    assert passes[2 * scale["largest"]]["non_finite"] > 0 == passes[scale["largest"]]["non_finite"]
    assert passes[scale["default"]]["first_non_finite"].startswith("model.")
    skips = int(math.log2(scale["default"] / scale["largest"]))
    assert f"the default, 2^16, overflows here: a run may begin with up to {skips} skipped update" in result.stdout
    assert f"of {run_verdict.largest_gradient(measured_of(found))}" in result.stdout
    assert (result.exit_code, found["verdict"]) == (0, "FIT")


def measured_of(found: dict) -> Measured:
    """Enough of it to name the largest gradient."""
    outputs, weights = (
        {row["name"]: row["gradient_max_abs"] for row in found["run"][kind] if row["gradient_max_abs"] is not None}
        for kind in ("modules", "parameters")
    )
    return Measured({}, {}, [], largest_outputs=outputs, largest_weights=weights)


def test_of_several_micro_batches_the_worst_counts():
    measured = Measured({}, {}, [])
    for exponent, largest, bad in ((16, 0.25, 0), (16, 0.0, 3), (9, 100.0, 0)):
        seen = Gradients(2.0**exponent)
        seen.outputs["a"] = Tally(9, bad, 0, largest * 2.0**exponent)
        measured.note(exponent, seen)
    measured.loss_scales += [LossScale(17, False, 0.25, (16,)), LossScale(9, True, 100.0, (16, 9, 10))]
    assert measured.largest_outputs == {"a": 100.0}
    assert measured.loss_scale == LossScale(9, True, 100.0, (16, 9, 10))
    measured.loss_scales.append(LossScale(9, True, 110.0, (16, 9, 10)))
    assert (measured.loss_scale.exponent, measured.loss_scale.largest_at_one) == (9, 110.0)
    measured.loss_scales.append(LossScale(None, False, None, (16, -24)))
    assert measured.loss_scale.exponent is None
    assert (measured.gradients[16].non_finite, measured.gradients[16].outputs["a"].values) == (3, 18)


def test_experts_and_tied_embeddings(tiny_model, tiny_moe_model, tmp_path):
    found = json.loads(command(tiny_moe_model, "--json").stdout)
    assert found["verdict"] == "FIT"
    names = {parameter["name"] for parameter in found["run"]["parameters"]}
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight"} <= names
    tied = copied(
        tiny_model, tmp_path / "model", lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True
    )
    assert json.loads(command(tied, "--json").stdout)["verdict"] == "FIT"


def test_a_refused_architecture_is_not_run(tmp_path):
    result = command(make_model(tmp_path / "model", model_type="gemma3_text"))
    assert result.exit_code == 2
    assert "note: nothing was run: vLLM refuses gemma3_text in float16" in result.stdout
    assert "running" not in result.stderr


def test_one_file_and_a_folder_without_config_give_the_weights_with_a_note(tiny_model, tmp_path):
    result = command(tiny_model / "model.safetensors")
    assert result.exit_code == 0
    assert "note: nothing was run: this is one file of weights. Name the model's folder" in result.stdout
    path = copied(tiny_model, tmp_path / "model")
    (path / "config.json").unlink()
    result = command(path)
    assert (result.exit_code, "note: nothing was run: there is no config.json" in result.stdout) == (0, True)
    assert command(tiny_model, "--weights-only").stdout.splitlines()[-1].startswith("FIT for FP16, as far as its")


@pytest.mark.parametrize(
    ("config", "told"),
    (
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification is no causal language"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel is no causal language model"),
        ({"model_type": "of-the-future"}, "transformers cannot read it"),
        (
            {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
            "needs model.layers.2.self_attn.q_proj.weight",
        ),
        ({"hidden_act": "nonsense"}, "transformers cannot build the model (KeyError"),
    ),
)
def test_what_cannot_be_run_is_one_line_and_the_weights_are_kept(config, told, tiny_model, tmp_path):
    path = copied(tiny_model, tmp_path / "model", **config)
    result = command(path)
    line = told_on_stderr(result)
    assert result.exit_code == 3
    assert told in line and "--weights-only" in line and line.startswith(f"verl-fp16: {path}")
    assert "no verdict: the weights alone are FIT, and the run did not come to an end" in result.stdout
    found = json.loads(command(path, "--json").stdout)
    assert (found["verdict"], found["weights_verdict"]) == (None, "FIT")
    assert told in found["error"] and len(found["tensors"]) == 25


def test_weights_that_are_unfit_stay_so_whatever_cannot_be_run(tiny_model, tmp_path):
    def plant(tensors):
        tensors["lm_head.weight"][0, 0] = 7e4

    path = copied(tiny_model, tmp_path / "model", plant, architectures=["Qwen3ForSequenceClassification"])
    result = command(path, "--json")
    assert (result.exit_code, json.loads(result.stdout)["verdict"]) == (2, "UNFIT")
    assert "is no causal language model" in told_on_stderr(result)


def write_prompts(file: Path, *prompts) -> Path:
    file.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts))
    return file


def test_the_verdict_says_what_it_is_of(tiny_model, tmp_path):
    file = write_prompts(tmp_path / "a.jsonl", "three")
    assert "FIT for FP16, on these prompts\n" in command(tiny_model, "--prompts", str(file)).stdout
    assert "FIT for FP16, on generated tokens" in command(tiny_model).stdout


def test_prompts_of_ones_own(tiny_model, tmp_path):
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    file = write_prompts(tmp_path / "a.jsonl", chat, "three", "this one is not read")
    found = json.loads(command(tiny_model, "--prompts", str(file), "--limit", "2", "--json").stdout)
    run = found["run"]
    assert (run["source"], run["sequences"]) == (f"the first 2 prompts of {file}", 2)
    assert run["longest"] > len("What is 3 + 4?")
    assert run["tokens"] == run["longest"] + len("three")


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    (
        (["ok", "x" * 60], ["--max-tokens", "50"], ", row 1 has 60 tokens, and at most 50 are run. --max-tokens 60"),
        (["x" * 200], [], ", row 0 has 200 tokens, and the model's context is 128. Leave it out, or cut it: --cut"),
        (["x"], [], ", row 0 has 1 token, and the loss needs two"),
        (["ok", ""], [], ", row 1: prompt has to be text, or a list"),
    ),
)
def test_prompts_that_cannot_be_run_are_one_line_and_the_weights_are_kept(rows, options, told, tiny_model, tmp_path):
    file = write_prompts(tmp_path / "a.jsonl", *rows)
    result = command(tiny_model, "--prompts", str(file), *options)
    line = told_on_stderr(result)
    assert (result.exit_code, line.startswith(f"verl-fp16: {file}")) == (3, True)
    assert told in line
    assert "no verdict: the weights alone are FIT, and the run did not come to an end" in result.stdout
    found = json.loads(command(tiny_model, "--prompts", str(file), *options, "--json").stdout)
    assert (found["verdict"], told in found["error"]) == (None, True)


def test_long_prompts_are_cut_where_asked(tiny_model, tmp_path):
    file = write_prompts(tmp_path / "a.jsonl", "x" * 200, "ok")
    result = command(tiny_model, "--prompts", str(file), "--cut")
    assert result.exit_code == 0
    assert "note: 1 of 2 prompts were cut to 128 tokens" in result.stdout


def test_a_wrong_column_and_a_file_that_is_not_there(tiny_model, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "x"}\n')
    result = command(tiny_model, "--prompts", str(tmp_path / "a.jsonl"))
    assert (
        result.exit_code,
        "there is no column prompt. Needed are prompt; here are question" in told_on_stderr(result),
    ) == (3, True)
    result = command(tiny_model, "--prompts", str(tmp_path / "gone.txt"))
    assert (result.exit_code, "there is no such file" in told_on_stderr(result)) == (3, True)


def test_without_a_tokenizer_random_tokens_are_run_and_prompts_refused(tiny_model, tmp_path):
    path = copied(tiny_model, tmp_path / "model")
    for file in path.glob("*token*"):
        file.unlink()
    result = command(path)
    assert result.exit_code == 0
    assert "note: the model has no tokenizer: no text was run, random tokens alone" in result.stdout
    result = command(path, "--prompts", str(write_prompts(tmp_path / "a.jsonl", "hello")))
    assert (result.exit_code, "the model has no tokenizer to read" in told_on_stderr(result)) == (3, True)


def test_messages_need_a_chat_template(tiny_model, tmp_path):
    path = copied(tiny_model, tmp_path / "model")
    (path / "chat_template.jinja").unlink(missing_ok=True)
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("chat_template", None)
    file.write_text(json.dumps(settings))
    prompts = write_prompts(tmp_path / "a.jsonl", [{"role": "user", "content": "hello"}])
    result = command(path, "--prompts", str(prompts))
    assert (result.exit_code, "row 0 has chat messages, and the model's" in told_on_stderr(result)) == (3, True)
    assert "6 built-in texts;" in command(path).stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_cuda_device(tiny_model):
    result = command(tiny_model, "--device", "cuda")
    assert (result.exit_code, "torch finds no CUDA device here" in told_on_stderr(result)) == (3, True)


def test_ctrl_c_in_the_second_half_keeps_the_first(tiny_model, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run", interrupted)
    result = command(tiny_model)
    assert (result.exit_code, told_on_stderr(result)) == (130, "verl-fp16: interrupted; there is no verdict")
    assert "no verdict: the weights alone are FIT, and the run did not come to an end" in result.stdout
    found = json.loads(command(tiny_model, "--json").stdout)
    assert (found["verdict"], found["error"]) == (None, "interrupted; there is no verdict")
    assert len(found["tensors"]) == 25


def test_ctrl_c_from_outside_during_the_passes(tiny_model):
    code = (
        "import time\nfrom verl_fp16.preflight import passes\nfrom verl_fp16.cli.app import app\n"
        "passes.search = lambda backward, *_: (backward(1.0), print('here', flush=True), time.sleep(60))\napp()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "preflight", str(tiny_model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    shown, told = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "verl-fp16: interrupted; there is no verdict"
    assert "no verdict: the weights alone are FIT, and the run did not come to an end" in shown


@pytest.mark.parametrize(
    ("outputs", "scale", "verdict", "told"),
    (
        ({"a": Tally(9, largest=16376.0)}, 65536.0, "FIT", None),
        ({"a": Tally(9, largest=16384.0)}, 65536.0, "AT RISK", "a (largest 16,384, headroom 4.0)"),
        ({"a": Tally(9, largest=1.0)}, 16.0, "FIT", None),
        ({"a": Tally(9, largest=1.0)}, 8.0, "AT RISK", "overflow from a loss scale of 16 on"),
        ({"a": Tally(9, largest=1.0)}, 8.0, "AT RISK", "verl_fp16.loss_scale.init=8 with verl_fp16.loss_scale.min=0.5"),
        ({"a": Tally(9, largest=1.0)}, None, "UNFIT", "not finite at any loss scale, down to 2^-24"),
        ({"a": Tally(9), "b": Tally(9, non_finite=2)}, 65536.0, "UNFIT", "it arises in b (Kind, 2 of 9 values)"),
    ),
)
def test_thresholds_of_the_verdict(outputs, scale, verdict, told):
    exponent = None if scale is None else int(math.log2(scale))
    found = LossScale(exponent, True, None if scale is None else 65504 / scale, (-24,))
    measured = Measured(outputs, dict.fromkeys(outputs, "Kind"), [], loss_scales=[found])
    judged = run_verdict.judge_run(Verdict("FIT", ()), measured)
    assert judged.verdict == verdict
    assert told is None or told in judged.reasons[0].why


def test_the_settings_that_are_named_exist():
    settings = LossScaleSettings(init=8, min=0.5)
    assert (settings.init, 2.0 ** run_verdict.default_exponent()) == (8, LossScaleSettings().init)


def test_the_page_names_each_key_column_and_threshold(tiny_model):
    page = (Path(__file__).parents[2] / "docs" / "preflight.md").read_text()
    found = json.loads(command(tiny_model, "--json").stdout)
    run = found["run"]
    keys = {*run, *run["modules"][0], *run["parameters"][0], *run["loss_scale"], *run["loss_scale"]["passes"][0]}
    keys |= {"weights_verdict", "error", "culprits"} | {f"run.{key}" for key in ("modules", "parameters", "loss_scale")}
    named = set(re.findall(r"`([\w.]+)`", page)) | {
        name.partition(".")[2] for name in re.findall(r"`(run\.\w+)`", page)
    }
    assert sorted(keys - named) == []
    header = next(line for line in command(tiny_model).stdout.splitlines() if line.startswith("module\t"))
    assert [name for name in header.split("\t") if f"| {name.replace('|', chr(92) + '|')} |" not in page] == []
    assert (
        f"a headroom below {run_verdict.HEADROOM:g}; or a largest loss scale below {run_verdict.SMALLEST_SCALE:g}"
        in page
    )
    assert f"Micro-batches have at most {MICRO_BATCH_TOKENS} tokens" in page


def test_prompts_that_are_not_there_are_told_before_the_weights_are_read(tiny_model, tmp_path):
    (tmp_path / "empty.txt").touch()
    for name, told in (("gone.txt", "gone.txt: there is no such file"), ("empty.txt", "empty.txt: the file is empty")):
        result = command(tiny_model, "--prompts", str(tmp_path / name))
        assert (result.exit_code, result.stdout, told in told_on_stderr(result)) == (3, "", True)


@pytest.mark.parametrize(
    ("options", "told"),
    (
        (("--weights-only", "--prompts", "a"), "--prompts has no effect beside --weights-only: leave it out"),
        (("--limit", "3", "--cut"), "--limit and --cut have no effect without --prompts: leave them out"),
    ),
)
def test_an_option_that_would_do_nothing_is_refused(tiny_model, options, told):
    result = command(tiny_model, *options)
    assert (result.exit_code, result.stdout, told in told_on_stderr(result)) == (3, "", True)
