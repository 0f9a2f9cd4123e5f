"""docs/config.md is what the program makes, and has every key."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_ds.config.known_keys import ACCEPTED, ALIASES, DEPRECATED, REFUSED
from hpc_ds.config.known_names import OPTIMIZERS, REFUSED_OPTIMIZERS, SCHEDULES
from hpc_ds.config.model import section_of
from hpc_ds.config.table import config_page
from hpc_ds.config.training import sections

HERE = Path(__file__).resolve().parent
KINDS = {
    **{
        f"{at}{name}": "supported"
        for at, model in sections()
        for name, field in model.model_fields.items()
        if section_of(field.annotation) is None
    },
    **dict.fromkeys(ACCEPTED, "accepted"),
    **dict.fromkeys(REFUSED, "refused"),
}


def test_the_page_is_current() -> None:
    """If not: ``make docs``."""
    assert (HERE.parent.parent / "docs" / "config.md").read_text(encoding="utf-8") == config_page()


def rows() -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split(" | ")] for line in config_page().splitlines() if line.startswith("| `")
    ]


def test_every_key_has_one_row_with_what_is_done_and_why() -> None:
    kinds = ("supported", "accepted", "refused")
    found = [(row[0].strip("| `"), row[2], row[3].strip("| ")) for row in rows() if len(row) > 3 and row[2] in kinds]
    keys = [(key, kind) for key, kind, _ in found if "`: `" not in key]
    assert sorted(keys) == sorted(KINDS.items())
    assert [key for key, _, words in found if not words] == []


def test_every_other_spelling_and_name_is_there() -> None:
    page = config_page()
    names = [*ALIASES, *DEPRECATED, *OPTIMIZERS, *REFUSED_OPTIMIZERS, *SCHEDULES]
    names += [parameter for known in SCHEDULES.values() for parameter in known]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_every_key_of_deepspeed_is_there() -> None:
    page = config_page()
    keys = json.loads((HERE / "deepspeed_keys.json").read_text(encoding="utf-8"))
    whole = {key for key in REFUSED if "." not in key}
    missing = [key for key in keys if f"`{key}`" not in page and key.partition(".")[0] not in whole]
    # These are sections of ours, and stand there key by key.
    sections = ["leaf_module", "offload_optimizer", "offload_param"]
    assert missing == [f"zero_optimization.{name}" for name in sections]
