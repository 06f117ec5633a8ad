"""The supported releases of verl are fetched once, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import releases
import verl_releases

VERSION = releases.RELEASES[0]


@pytest.fixture
def pip_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def put_wheel(links: Path, version: str = VERSION) -> None:
    info = f"verl-{version}.dist-info"
    with zipfile.ZipFile(links / f"verl-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("verl/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: verl\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_fetched_with_pips_settings_and_only_once(tmp_path, pip_links):
    put_wheel(pip_links)
    folder = verl_releases.release_folder(VERSION, folder=tmp_path / "releases")
    assert folder == tmp_path / "releases" / VERSION
    assert (folder / "verl" / "__init__.py").exists()
    (folder / "seen").touch()
    (pip_links / f"verl-{VERSION}-py3-none-any.whl").unlink()
    assert verl_releases.release_folder(VERSION, folder=tmp_path / "releases") == folder
    assert (folder / "seen").exists(), "the second call fetches nothing"
    assert [path.name for path in (tmp_path / "releases").iterdir()] == [VERSION], "nothing is left beside it"


def test_what_pip_does_not_find_is_one_clear_error(tmp_path, pip_links):
    put_wheel(pip_links, "0.7.9")
    with pytest.raises(verl_releases.ReleaseNotFetched) as caught:
        verl_releases.release_folder(VERSION, folder=tmp_path / "releases")
    message = str(caught.value)
    assert f"the wheel of verl {VERSION}" in message
    assert "No matching distribution" in message, "pip's own words"
    assert "PIP_FIND_LINKS" in message
    assert list((tmp_path / "releases").iterdir()) == [], "nothing half fetched is left"


def test_another_version_is_refused():
    with pytest.raises(ValueError, match="verl 0.7.1 is not one of the supported releases: 0.8.0, "):
        verl_releases.release_folder("0.7.1")


def test_one_of_two_that_fetch_at_the_same_time_wins(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for unpacked in (first, second):
        (unpacked / "verl").mkdir(parents=True)
        verl_releases._move_into_place(unpacked, tmp_path / "release")
    assert (tmp_path / "release" / "verl").is_dir()
    assert not second.exists()


def test_the_installed_verl_is_supported():
    code = "import importlib.metadata as m; print(m.version('verl'))"
    installed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert installed == releases.RELEASES[-1], "the newest supported release is the one that make setup installs"


@pytest.mark.parametrize("version", releases.RELEASES)
def test_a_child_process_finds_that_release_as_verl(version):
    """Module and distribution; that the plugins are loaded too is what the engine tests show."""
    code = (
        "import importlib.metadata, importlib.util\n"
        "print(importlib.metadata.version('verl'), importlib.util.find_spec('verl').origin)\n"
    )
    env = {**os.environ, **releases.release_environment(version)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert process.stdout.split() == [version, str(releases.release_folder(version) / "verl" / "__init__.py")]
