"""Fixtures that several modules of this tier share."""

from __future__ import annotations

import pytest
from exports import Saves, make_models, make_saves
from releases import PATCHED, RELEASES


@pytest.fixture(scope="session", params=(*RELEASES, PATCHED))
def saves(request, tiny_model, tmp_path_factory) -> Saves:
    """Checkpoints of each release."""
    models = make_models(tiny_model, tmp_path_factory.mktemp("models"))
    return make_saves(request.param, models, tmp_path_factory.mktemp("saves"))
