"""The ranks of Hugging Face's tests: what takes their seconds is importing transformers, so all cases share them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import test_accelerate
import test_early_loading
import test_trainer
import test_trainer_in_a_run
import test_trainer_stories
from ranks import Outcomes, run_cases

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a folder for each case, by its name."""
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture(scope="session")
def came(folder: Path) -> Outcomes:
    """What came of every case."""
    modules = (test_trainer, test_trainer_stories, test_trainer_in_a_run, test_accelerate, test_early_loading)
    return run_cases(2, {name: case for module in modules for name, case in module.cases(folder).items()}, worlds=2)
