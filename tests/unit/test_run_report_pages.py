"""The page, the Markdown and the pictures: everything is in them, nothing of a run's data can do harm in them."""

from __future__ import annotations

import errno
import io
import math
import os
import random
import re
import warnings
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
from evidence_samples import token
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from report_runs import METRICS, alarm, entry, loaded, write_evidence, write_log

from verl_fp16.run_report import contents, markdown, page, writing
from verl_fp16.run_report.assemble import Run, load
from verl_fp16.run_report.curves import PANELS, is_wanted
from verl_fp16.run_report.figures import COLOURS, DARK_COLOURS, as_png, as_svg
from verl_fp16.run_report.markdown import code, escape
from verl_fp16.run_report.places import find_runs
from verl_fp16.run_report.reading import read_log
from verl_fp16.run_report.writing import MARKDOWN, PAGE, make, put

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a|b|c",
    "`code` **bold** [link](http://x) ![i](y) $m$ ~~s~~",
    "\u202eturned around\u2066",
    "two\nlines\r\n# heading",
    "&lt;&amp;",
    "</style></svg>",
    "-->",
    "__init__",
]
PANEL = {panel.key: panel for panel in PANELS}
PNG = b"\x89PNG\r\n\x1a\n"


class Elements(HTMLParser):
    """What a browser would take the page for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def named(tmp_path: Path, *names: str) -> list[Run]:
    logs = [write_log(tmp_path / f"{number}" / "metrics.jsonl") for number in range(len(names))]
    return [load(place) for place in find_runs([f"{name}={log}" for name, log in zip(names, logs, strict=True)])]


def svgs(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, bytes]:
    """A report on a run with evidence of an alarm, a skip and a resumption, and one without."""
    folder = tmp_path_factory.mktemp("two")
    noise = random.Random(0)
    path = write_log(
        folder / "fp16" / "metrics.jsonl",
        range(0, 201),
        skipped_steps=lambda step: float(step == 50),
        k3=lambda step: 1e-6 * math.exp(noise.gauss(0, 0.2)),
        grad_norm=lambda step: "leave out" if step == 50 else 1.0,
        score_mean=lambda step: None if step == 77 else noise.random(),
    )
    path.write_text(path.read_text() + entry(200, {"verl_fp16/resumed_from_step": 200}))
    write_evidence(folder / "fp16" / "checkpoints", 120, alarm(120), scalars={})
    plain = {"critic/rewards/mean": 0.1, "training/rollout_probs_diff_mean": 1e-3, "actor/entropy": 0.2}
    (folder / "plain").mkdir()
    (folder / "plain" / "metrics.jsonl").write_text("".join(entry(step, plain) for step in range(300)))
    return make("two runs", [loaded(folder / "fp16"), loaded(folder / "plain")])


def test_the_page_loads_and_runs_nothing(two):
    html = two[PAGE].decode()
    elements = Elements(html)
    tags = {tag for tag, _ in elements.tags}
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "form", "base", "a"})
    for _, attributes in elements.tags:
        assert not any(name.startswith("on") or name in ("src", "href", "srcset", "action") for name in attributes)
        assert str(attributes.get("xlink:href", "#")).startswith("#")
    assert not re.search(r"@import|url\((?!#)", html)
    assert "default-src 'none'" in html


def test_every_panel_that_a_run_measured_is_a_picture_with_labelled_axes(two):
    pictures = {ElementTree.fromstring(svg).get("aria-label"): svg for svg in svgs(two[PAGE].decode())}
    unmeasured = {"validation", "critic_loss_scale", "critic_skipped"}
    expected = [panel for panel in PANELS if panel.key not in unmeasured]
    assert len(pictures) == len(expected)
    for panel in expected:
        svg = pictures[f"{panel.title}, {panel.label}, over training steps"]
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        assert "training step" in texts and panel.label in texts
    text = Elements(two[PAGE].decode()).text
    for key in unmeasured:
        assert PANEL[key].title in text  # "Not logged by any run"


def test_a_run_has_its_colour_everywhere_and_the_theme_decides_which_it_is(two):
    html = two[PAGE].decode()
    for svg in svgs(html):
        assert not re.search(r"#[0-9a-f]{6}", re.sub(r'(id|href|clip-path)="[^"]*"', "", svg))
    by_panel = {ElementTree.fromstring(svg).get("aria-label").split(",")[0]: svg for svg in svgs(html)}
    for title in ("Reward", "Entropy of the policy"):
        assert "var(--run0)" in by_panel[title] and "var(--run1)" in by_panel[title]
    assert "var(--run1)" not in by_panel["Loss scale"]
    for index, (light, dark) in enumerate(zip(COLOURS, DARK_COLOURS, strict=True)):
        assert html.count(f"--run{index}: {light};") == html.count(f"--run{index}: {dark};") == 1


def test_no_two_elements_of_the_page_have_one_id(two):
    ids = [attributes["id"] for _, attributes in Elements(two[PAGE].decode()).tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0


def test_the_page_and_the_markdown_tell_the_same(two):
    text = " ".join(Elements(two[PAGE].decode()).text.split())
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(two[MARKDOWN].decode())
    plain = " ".join(Elements(rendered).text.split())
    for told in (
        "mismatch/k3 is 6e-06",
        "find what changed",
        "verl-fp16 tokens ",
        "is not a finite number",
        "The tokens with the largest gap, at step 120",
        "resumed from 200",
        "name the run's trainer.default_local_dir with --evidence 'plain=FOLDER'",
        "critic/score/mean (fp16); critic/rewards/mean (plain)",
        "training/rollout_probs_diff_mean (plain)",
        "larger is better",
        "A reward has collapsed where",
    ):
        assert told in text and told in plain, told


def test_the_pictures_of_the_markdown_are_there(two):
    named_ = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", two[MARKDOWN].decode())
    assert set(named_) == {name for name in two if name.endswith(".png")}
    assert all(two[name].startswith(PNG) and len(two[name]) > 20_000 for name in named_)


def rendered(runs: list[Run], title: str) -> tuple[str, str]:
    """The page and the Markdown without pictures, in which nothing is that a run names."""
    pictures = {group: "picture.png" for group, _ in contents.groups(runs)}
    return page.render(title, "today", runs, None), markdown.render(title, "today", runs, pictures, None)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory) -> list[str]:
    """The elements of a page on :func:`hostile_run` with harmless text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "as_svg", lambda *_: "<svg></svg>")
        run = hostile_run(tmp_path_factory.mktemp("harmless"), "x")
        return [tag for tag, _ in Elements(rendered([run], "x")[0]).tags]


def hostile_run(tmp_path: Path, text: str) -> Run:
    """A run with ``text`` as name, in a line of an alarm, and in a token and its context."""
    folder = tmp_path / "run"
    log = write_log(folder / "metrics.jsonl")
    told = alarm(2).replace("find what", f"find {text} what").replace("2e-06 ->", f"{text} ->")
    evidence = write_evidence(folder / "checkpoints", 2, told, tokens=(token(0),), scalars={})
    table = pq.read_table(evidence / "tokens.parquet")
    for column in ("text", "before", "after"):
        table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), [[text]])
    pq.write_table(table, evidence / "tokens.parquet")
    (place,) = find_runs([f"{text}={log}"])
    return load(place)


def test_nothing_in_a_picture_is_cut_off_at_its_edge(two):
    from matplotlib.image import imread

    for name in (name for name in two if name.endswith(".png")):
        pixels = imread(io.BytesIO(two[name]))[..., :3]
        for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
            assert (edge == 1.0).all(), name


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_tokens_are_text_on_the_page(tmp_path, monkeypatch, harmless, text):
    monkeypatch.setattr(page, "as_svg", lambda *_: "<svg></svg>")
    html, md = rendered([hostile_run(tmp_path, text)], text)
    elements = Elements(html)
    inserted = len(re.findall("`[^`]+`", text)) * 2  # backticks in a line of an alarm are code
    assert len(elements.tags) == len(harmless) + inserted
    assert {tag for tag, _ in elements.tags} == set(harmless)
    assert elements.text.replace("`", "").count(contents.printable(text.strip()).replace("`", "")) >= 8
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(md)
    inline = [child for outer in tokens for child in outer.children or ()]
    assert {child.content for child in inline if child.type == "html_inline"} <= {"<br>"}
    assert not [outer for outer in tokens if outer.type == "html_block"]
    harmless_types = {"text", "softbreak", "strong_open", "strong_close", "code_inline", "html_inline", "image"}
    assert {child.type for child in inline} <= harmless_types | {"text_special"}
    assert len([child for child in inline if child.type == "image"]) == 3
    assert len([outer for outer in tokens if outer.type == "tr_open"]) == 1 + 12 + 1 + 1
    # Of cells too many, a table shows the first ones only.
    last = [cell for row, cell in pairwise(tokens) if cell.type == "inline" and row.type == "td_open"][5:72:6]
    assert len(last) == 12 and all(re.fullmatch("[1-3]|−", cell.content) for cell in last)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip))
def test_any_text_is_itself_in_markdown(text):
    shown = " ".join(contents.printable(text).split())
    for made in (escape(text), code(text)):
        (_, inline, _) = MarkdownIt("commonmark", {"html": True}).parse(f"x {made} x")
        parts = [child.content for child in inline.children]
        assert " ".join("".join(parts).split()) == f"x {shown} x"
        assert {child.type for child in inline.children} <= {"text", "code_inline", "text_special"}


values = st.one_of(st.none(), st.floats(allow_nan=False), st.sampled_from([0.0, 1e308, -1e308, 5e-324, 1e-320]))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["reward", "k3", "slope", "loss_scale", "skipped"]), st.lists(values, min_size=1, max_size=70))
def test_any_values_can_be_drawn(tmp_path_factory, key, drawn):
    path = tmp_path_factory.getbasetemp() / "any" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(entry(step, {PANEL[key].names[0]: value}) for step, value in enumerate(drawn)))
    run = loaded(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ElementTree.fromstring(as_svg(PANEL[key], [run], None))
        contents.as_json([run])


def test_a_single_step_is_a_picture(tmp_path):
    run = loaded(write_log(tmp_path / "run" / "metrics.jsonl", [7]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = make("one step", [run])
    assert len(svgs(made[PAGE].decode())) == 12


def test_names_of_all_kinds_are_in_the_legend_without_a_warning(tmp_path):
    runs = named(tmp_path, "運行", "_hidden", "$x^2$", "$", "\\frac", "x" * 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_png("Learning", [PANEL["reward"]], runs, None).startswith(PNG)


def test_ten_runs_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "as_png", lambda *_: b"")
    html = make("ten", named(tmp_path, *"abcdefghij"))[PAGE].decode()
    swatches = set(re.findall(r'<span class="swatch" style="([^"]*)">', html))
    assert len(swatches) == 10


def test_four_long_runs_are_less_than_two_megabytes(tmp_path):
    noise = random.Random(0)
    paths = []
    for number in range(4):
        changes = {
            key: lambda step: math.exp(noise.gauss(0, 1)) for key in ("score_mean", "entropy", "k3", "grad_norm")
        }
        changes |= {key: lambda step: noise.random() for key in ("log_prob_abs_diff_mean", "log_prob_abs_diff_p99")}
        changes |= {key: lambda step: noise.random() for key in ("slope_per_1k_tokens", "prob_abs_diff_mean", "step")}
        paths.append(write_log(tmp_path / f"{number}" / "metrics.jsonl", range(3000), **changes))
    made = make("long", [loaded(path) for path in paths])
    assert len(made[PAGE]) < 2_000_000
    assert sum(map(len, made.values())) < 5_000_000


def test_what_a_panel_takes_is_wanted():
    wanted = is_wanted()
    assert all(wanted(name) for panel in PANELS for name in panel.names)
    assert all(wanted(name) for name in METRICS)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    put(tmp_path, {"a": b"old", "b": b"old"})
    written = []

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path, {"a": b"new", "b": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old", "b": b"old"}


def test_a_file_takes_its_name_at_once(tmp_path, monkeypatch):
    put(tmp_path, {"a": b"old"})

    def replace(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, {"a": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_a_new_report_takes_the_place_of_the_old_one(tmp_path):
    put(tmp_path / "new" / "folder", {"a": b"old", "kept": b"kept"})
    assert put(tmp_path / "new" / "folder", {"a": b"new"}) == [tmp_path / "new" / "folder" / "a"]
    found = {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()}
    assert found == {"a": b"new", "kept": b"kept"}


def test_a_log_may_grow_while_it_is_read(tmp_path):
    path = write_log(tmp_path / "run" / "metrics.jsonl", range(1, 500))
    lines = path.read_text()

    def grow(_: int) -> None:
        with open(path, "a") as file:
            file.write(entry(10**6, {"actor/entropy": 1.0}))

    path.write_text(lines * 10)
    assert read_log(path, is_wanted(), grow).steps[-1] in (499, 10**6)
