"""`make setup` hands uv exactly what pip is set up with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup_env.py"
spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)

TORCH = setup_env.pinned_torch()
MAJOR, MINOR = sys.version_info[:2]
CPU_BACKEND = ["--torch-backend", "cpu"]


def wheel(version: str = TORCH, local: str = "+cpu", python: str = f"cp{MAJOR}{MINOR}") -> str:
    return f"torch-{version}{local}-{python}-{python}-manylinux_2_28_x86_64.whl"


def listing(**sections: dict[str, str]) -> str:
    """Sorted lines of section.key=repr(value), as pip prints them; env stands for :env:."""
    names = {"env": ":env:"}
    pairs = {f"{names.get(s, s)}.{key}": value for s, items in sections.items() for key, value in items.items()}
    return "".join(f"{key}={value!r}\n" for key, value in sorted(pairs.items()))


def test_a_listing_as_pip_prints_it():
    text = (
        ":env:.cert='/etc/ssl/ca.crt'\n"
        ":env:.default-timeout='180'\n"
        ":env:.find-links='/srv/wheels'\n"
        "global.extra-index-url='\\nfile:///srv/a/simple\\nhttps://b.example/simple'\n"
        "global.find-links='/srv/other'\n"
        "install.no-index='true'\n"
    )
    assert setup_env.parse_settings(text) == {
        "cert": "/etc/ssl/ca.crt",
        "default-timeout": "180",
        "find-links": "/srv/wheels",
        "extra-index-url": "\nfile:///srv/a/simple\nhttps://b.example/simple",
        "no-index": "true",
    }


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"global": {"index-url": "g"}}, "g"),
        ({"global": {"index-url": "g"}, "install": {"index-url": "i"}}, "i"),
        ({"global": {"index-url": "g"}, "env": {"index-url": "e"}}, "e"),
        ({"install": {"index-url": "i"}, "env": {"index-url": "e"}}, "e"),
        ({"global": {"index-url": "g"}, "install": {"index-url": "i"}, "env": {"index-url": "e"}}, "e"),
        ({"global": {"index-url": "g"}, "env": {"index-url": ""}}, "g"),
        ({"global": {"index-url": "g"}, "site": {"index-url": "s"}, "user": {"index-url": "u"}}, "g"),
        ({"global": {"index-url": "g"}, "download": {"index-url": "d"}}, "g"),
    ],
)
def test_later_sections_replace_earlier_ones(sections: dict[str, dict[str, str]], expected: str):
    assert setup_env.parse_settings(listing(**sections)) == {"index-url": expected}


def test_links_are_replaced_and_not_merged():
    settings = setup_env.parse_settings(listing(**{"global": {"find-links": "/a /b"}, "env": {"find-links": "/c"}}))
    assert settings == {"find-links": "/c"}


def test_settings_are_merged_key_by_key():
    text = listing(**{"global": {"index-url": "g", "cert": "c"}, "install": {"no-index": "1"}, "env": {"cert": "e"}})
    assert setup_env.parse_settings(text) == {"index-url": "g", "cert": "e", "no-index": "1"}


@pytest.mark.parametrize(
    "value", ["it's", 'a"b', 'it\'s "b"', "https://h.example/?a=b&c='d'", "one\ntwo", "back\\slash"]
)
def test_values_survive_their_quoting(value: str):
    assert setup_env.parse_settings(listing(env={"index-url": value})) == {"index-url": value}


def test_lines_that_are_no_settings_are_passed_over():
    assert setup_env.parse_settings("WARNING: something = else\n\nglobal.broken\n") == {}


def test_without_settings_only_the_backend_is_named():
    assert setup_env.sources({}) == CPU_BACKEND


def test_extra_indexes_are_equal_to_the_first_and_may_be_folders():
    settings = {
        "index-url": "https://a.example/simple",
        "extra-index-url": "\nhttps://b.example/simple\nfile:///srv/simple\nhttps://b.example/simple",
    }
    assert setup_env.sources(settings) == [
        *("--default-index", "https://a.example/simple"),
        *("--index", "https://b.example/simple"),
        *("--index", "file:///srv/simple"),
        *("--index-strategy", "unsafe-best-match"),
        *CPU_BACKEND,
    ]


def test_the_strategy_stays_without_extra_indexes():
    settings = {"index-url": "https://a.example/simple"}
    assert setup_env.sources(settings) == ["--default-index", "https://a.example/simple", *CPU_BACKEND]


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "on"])
def test_no_index_drops_the_indexes_and_keeps_the_links(tmp_path: Path, value: str):
    settings = {"no-index": value, "index-url": "https://a.example", "extra-index-url": "https://b.example"}
    options = setup_env.sources({**settings, "find-links": str(tmp_path)})
    assert options == ["--find-links", str(tmp_path), "--no-index", *CPU_BACKEND]


@pytest.mark.parametrize("value", ["false", "0", "no", "off"])
def test_no_index_can_be_off(value: str):
    settings = {"no-index": value, "index-url": "https://a.example"}
    assert setup_env.sources(settings) == ["--default-index", "https://a.example", *CPU_BACKEND]


def test_the_pinned_torch_is_the_extras():
    pyproject = (SCRIPT.parents[1] / "pyproject.toml").read_text()
    assert f'\n  "torch=={TORCH}",\n' in pyproject


def test_the_right_local_torch_replaces_the_backend(tmp_path: Path):
    (tmp_path / wheel()).touch()
    assert setup_env.sources({"find-links": f"https://h.example/wheels {tmp_path}"}) == [
        *("--find-links", "https://h.example/wheels"),
        *("--find-links", str(tmp_path)),
    ]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_folders_that_are_not_there_are_left_out(tmp_path: Path, scheme: str):
    links = f"{scheme}{tmp_path}/none {scheme}{tmp_path}"
    assert setup_env.sources({"find-links": links}) == ["--find-links", f"{scheme}{tmp_path}", *CPU_BACKEND]


@pytest.mark.parametrize(
    "name",
    [
        wheel(version="2.12.9"),
        wheel(version=f"{TORCH}.post1"),
        wheel(version=f"1{TORCH}"),
        wheel(python=f"cp{MAJOR}{MINOR + 1}"),
        wheel(python=f"cp{MAJOR}{MINOR}t"),
        wheel(local=""),
        wheel(local="+cu130"),
        wheel() + ".part",
        "torchvision-" + wheel(),
    ],
)
def test_another_local_torch_keeps_the_backend(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    assert setup_env.sources({"find-links": str(tmp_path)}) == ["--find-links", str(tmp_path), *CPU_BACKEND]


@pytest.mark.parametrize("host", ["", "localhost"])
def test_a_file_link_is_a_local_folder(tmp_path: Path, host: str):
    folder = tmp_path / "a b+c"
    folder.mkdir()
    link = f"file://{host}{folder.as_uri().removeprefix('file://')}"
    assert "%20" in link
    assert not setup_env.has_local_torch(link)
    (folder / wheel()).touch()
    assert setup_env.has_local_torch(link)
    assert setup_env.sources({"find-links": link}) == ["--find-links", link]


def test_links_that_are_no_folders_hold_no_torch(tmp_path: Path):
    (tmp_path / wheel()).touch()
    for link in ("https://h.example/wheels", str(tmp_path / wheel()), str(tmp_path / "none"), "file:///none"):
        assert not setup_env.has_local_torch(link)


def test_a_link_into_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / wheel()).touch()
    assert setup_env.sources({"find-links": "~"}) == ["--find-links", str(tmp_path)]


def test_certificates_proxy_and_hosts_go_by_the_environment():
    settings = {
        "cert": "/ca",
        "client-cert": "/me",
        "proxy": "http://p.example:1",
        "trusted-host": "a.example\nb.example:2",
    }
    assert setup_env.uv_environment(settings, {"HOME": "/h"}) == {
        "HOME": "/h",
        "SSL_CERT_FILE": "/ca",
        "SSL_CLIENT_CERT": "/me",
        "ALL_PROXY": "http://p.example:1",
        "UV_INSECURE_HOST": "a.example b.example:2",
    }


@pytest.mark.parametrize(
    ("key", "variable"),
    [
        ("cert", "SSL_CERT_FILE"),
        ("client-cert", "SSL_CLIENT_CERT"),
        ("proxy", "ALL_PROXY"),
        ("proxy", "all_proxy"),
        ("proxy", "HTTPS_PROXY"),
        ("proxy", "https_proxy"),
        ("trusted-host", "UV_INSECURE_HOST"),
    ],
)
def test_the_environment_goes_before_pips_settings(key: str, variable: str):
    assert setup_env.uv_environment({key: "pip"}, {variable: "own"}) == {variable: "own"}


def test_without_settings_the_environment_stays():
    assert setup_env.uv_environment({"index-url": "https://a.example"}, {"A": "b"}) == {"A": "b"}
