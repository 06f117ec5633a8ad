"""The command mismatch: one line for a wrong input, and what was done is kept."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from gap_command import OPTIONS, mismatch, read, refused
from typer.testing import CliRunner

from verl_fp16.cli.app import app
from verl_fp16.gap_report import driver, folder, stage


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--precision", "fp8"), "--precision fp8: it has to be fp16, bf16, fp32, or TRAINING/ROLLOUT"),
        (("--lengths", "9:3"), "--lengths 9:3: it has to be LEAST:MOST"),
        (("--strategy", "ddp"), "--strategy ddp: it has to be fsdp2 or fsdp"),
        (("--max-tokens", "500"), "row 0: the prompt has 4 tokens, and beside its answer the model has room for -373"),
        (("--from-run", "x"), "--from-run takes what a run has written: leave MODEL"),
    ),
)
def test_a_wrong_option_is_one_line(faked, options, message):
    assert message in refused(mismatch(faked, *options))


def test_wrong_files_are_one_line(faked, tmp_path):
    assert "there is no such file" in refused(mismatch(faked, prompts="none.txt"))
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt: the file is empty" in refused(mismatch(faked, prompts="empty.txt"))
    (tmp_path / "blank.txt").write_text("\n\n")
    assert "blank.txt: there is no prompt in it" in refused(mismatch(faked, prompts="blank.txt", output="blank"))
    (tmp_path / "other.jsonl").write_text('{"question": "1+1="}\n')
    told = refused(mismatch(faked, prompts="other.jsonl", output="other"))
    assert "other.jsonl, line 1: there is no column prompt" in told
    assert "no-model" in refused(mismatch(tmp_path / "no-model"))
    told = refused(CliRunner().invoke(app, ["mismatch"]))
    assert told == "name a MODEL and --prompts FILE, or a run's folder with --from-run"


def test_a_configuration_that_cannot_be_read_is_one_line(faked, tmp_path):
    import shutil

    other = shutil.copytree(faked, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    assert "config.json: transformers cannot read it" in refused(mismatch(other, *OPTIONS))


def test_damaged_prompts_of_the_folder_are_one_line(faked):
    assert mismatch(faked, *OPTIONS).exit_code == 0
    Path("out/prompts.parquet").write_bytes(b"PAR1")
    assert "prompts.parquet: it is damaged" in refused(mismatch(faked, *OPTIONS))


def test_a_full_disk_is_one_line_and_what_was_done_is_kept(faked, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "_SEQUENCES_OF_A_PART", 8)
    whole = pq.write_table
    written_so_far = []

    def full_after_five(table, file, **options):
        if len(written_so_far) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        written_so_far.append(file)
        whole(table, file, **options)

    monkeypatch.setattr(pq, "write_table", full_after_five)
    told = refused(mismatch(faked, *OPTIONS))
    assert "it cannot be written (No space left on device); what was done so far is kept" in told
    assert len(folder.parts(tmp_path / "out" / "tokens" / "bf16")) == 5
    monkeypatch.setattr(pq, "write_table", whole)
    assert mismatch(faked, *OPTIONS).exit_code == 0


@pytest.mark.parametrize("folders", ("tokens/bf16", "training/fp16@fp16"))
def test_a_damaged_part_is_one_line_and_made_again(faked, folders):
    assert mismatch(faked, *OPTIONS).exit_code == 0
    before = read()
    (part,) = folder.parts(Path("out") / folders)
    part.write_bytes(part.read_bytes()[:-99])
    told = refused(mismatch(faked, *OPTIONS))
    assert f"{part}: it is damaged" in told and "Remove it: the same command makes it again" in told
    part.unlink()
    assert mismatch(faked, *OPTIONS).exit_code == 0
    assert read() == before


def test_a_stage_that_dies_is_one_line_with_its_log(tmp_path, monkeypatch):
    from verl_fp16.gap_report.errors import GapError
    from verl_fp16.gap_report.folder import WorkFolder

    work = WorkFolder(tmp_path / "work", {"seed": 0})
    spec = {"stage": "no such stage", "total": 3}
    with pytest.raises(GapError, match=r"a stage ended with code 1; its output is in .*stages.log \| KeyError: 'no"):
        driver._stage(work, work.tokens("fp16"), spec, "a stage", lambda *told: None)
    assert "KeyError: 'no such stage'" in (work.path / driver.LOG).read_text()


_VLLM = (
    """
import json, os, sys
print("(EngineCore pid=7) ERROR 11-22 [core.py:1] ValueError: of the stage before")
""",
    """
import json, os, sys
print("(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1] torch.AcceleratorError: CUDA error: no kernel image")
print("(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1] some more")
said = {"failed": "vLLM does not run m in float16: Engine core initialization failed.", "look": LOOK}
os.write(int(sys.argv[2]), json.dumps(said).encode() + b"\\n")
sys.exit(2)
""",
)


@pytest.mark.parametrize("look", (True, False))
def test_what_vllm_only_logged_is_told_where_it_is_the_reason(tmp_path, monkeypatch, look):
    from verl_fp16.gap_report.errors import GapError
    from verl_fp16.gap_report.folder import WorkFolder

    work = WorkFolder(tmp_path / "work", {"seed": 0})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, text in zip(("good_stage", "bad_stage"), _VLLM, strict=True):
        (tmp_path / f"{name}.py").write_text(text.replace("LOOK", str(look)))
    spec = {"total": 3}
    monkeypatch.setattr(driver, "STAGE", "good_stage")
    driver._stage(work, work.tokens("fp16"), spec, "a stage", lambda *told: None)
    monkeypatch.setattr(driver, "STAGE", "bad_stage")
    with pytest.raises(GapError) as raised:
        driver._stage(work, work.tokens("fp16"), spec, "a stage", lambda *told: None)
    reason = "vLLM does not run m in float16: Engine core initialization failed."
    more = " | EngineCore: torch.AcceleratorError: CUDA error: no kernel image"
    assert str(raised.value) == reason + (more if look else "")


@pytest.mark.parametrize(
    ("options", "named"),
    (
        (("--ladder", "--precision", "fp16"), "--precision has no effect beside --ladder: leave it out"),
        (("--ladder", "--same-tokens"), "--same-tokens has no effect beside --ladder: leave it out"),
        (("--lengths", "3:9", "--max-tokens", "5"), "--max-tokens has no effect beside --lengths: leave it out"),
    ),
)
def test_an_option_that_would_do_nothing_is_refused(faked, options, named):
    assert refused(mismatch(faked, *options)) == named


def test_an_output_that_is_a_file_is_told_before_anything_is_done(faked, tmp_path):
    told = "--output prompts.txt: this is a file, and a folder is needed. Name another"
    assert refused(mismatch(faked, output="prompts.txt")) == told
    asked = ["sanity-set", str(faked), "--data", "x", "--reward", "y.py:z", "-o", "prompts.txt"]
    assert refused(CliRunner().invoke(app, asked)) == told
