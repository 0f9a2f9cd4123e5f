"""docs/config.md, made from the models and the tables, so that it cannot say what the program does not do."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticUndefined

from hpc_ds.config.known_keys import ACCEPTED, ALIASES, DEPRECATED, REFUSED, REFUSED_VALUES
from hpc_ds.config.known_names import OPTIMIZERS, REFUSED_OPTIMIZERS, REQUIRED, SCHEDULES
from hpc_ds.config.model import section_of
from hpc_ds.config.training import sections

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic.fields import FieldInfo

_HEAD = """\
# Training config

The JSON that DeepSpeed takes, with its spelling and its defaults (release 0.19.8), as a dict, a file, or URL-safe base64
of JSON. Each key of DeepSpeed is in the table: *supported*; *accepted*, which means that it does nothing here and one
warning says why; or *refused* with the reason, because ignoring it would change results or memory. A refused key that
asks for nothing (`null`, `false`, `{}`, a section with `"enabled": false`, the default) is passed over. A key that is
not in the table is an error that names the nearest one.

`"auto"` means the default, wherever it stands; a batch size that is `"auto"` counts as not given. Whole numbers may be
written as `5e8`. Comments are not JSON and not read.

`hpcds config explain FILE [--world-size N] [--parameters N]` prints what a config means: every value and where it comes
from, the batch arithmetic, and the bytes a rank needs at each ZeRO stage. `hpcds config schema` prints a JSON schema for
editors. This page is made by `make docs`.
"""

_BATCH = """\
## Batch sizes

`train_batch_size` = `train_micro_batch_size_per_gpu` x `gradient_accumulation_steps` x world size. Every rank is
data-parallel, so the world size is the number of ranks. What is missing is filled in, then the four are checked against
each other.

| given | inferred |
|---|---|
| all three | nothing |
| train, micro | accumulation = train // micro // world size |
| train, accumulation | micro = train // world size // accumulation |
| micro, accumulation | train = micro x accumulation x world size |
| train | accumulation = 1, micro = train // world size |
| micro | accumulation = 1, train = micro x world size |
| none, or only accumulation | an error |
"""

_MEMORY = """\
## Bytes that a rank holds

For each trainable parameter, with W ranks, c bytes of the compute type (fp16 or bf16: 2, fp32: 4), g bytes of the type
of accumulated gradients (`data_types.grad_accum_dtype`, else the compute type) and s bytes of optimizer state (Adam,
AdamW, Lamb 8; Lion, Adagrad, SGD with momentum 4; Muon about 4; SGD 0). In fp32 the masters are the parameters.

| stage | parameters | fp32 masters | gradients | optimizer state |
|---|---|---|---|---|
| 0 | c | 4 | g | s |
| 1 | c | 4 / W | g | s / W |
| 2 | c | 4 / W | g / W | s / W |
| 3 | 4 / W, which are the masters | | 4 / W | s / W |

`offload_optimizer` keeps masters and optimizer state in host memory, `offload_param` all of stage 3. Activations, buckets
in flight and the one block that stage 3 has gathered come on top.

Source: Rajbhandari et al., ZeRO, 2019, sections 3.1 and 5.
"""


def config_page() -> str:
    """The text of docs/config.md."""
    parts = [_HEAD, "## Keys\n", *_keys(), _BATCH, *_names(), _spellings(), _MEMORY]
    return "\n".join(parts)


def _keys() -> Iterator[str]:
    """One table for the top and one for each section, sections in sections in that of the outer one."""
    tables: dict[str, list[str]] = {"": []}
    for at, model in sections():
        for name, field in model.model_fields.items():
            if section_of(field.annotation) is None:
                _table_of(tables, f"{at}{name}").append(
                    _row(f"{at}{name}", _default(field), "supported", field.description or "")
                )
    for kind, listed in (("accepted", ACCEPTED), ("refused", REFUSED)):
        for key, (default, reason) in listed.items():
            _table_of(tables, key).append(_row(key, _json(default), kind, reason))
    for (key, value), reason in REFUSED_VALUES.items():
        _table_of(tables, key).append(_row(f"{key}`: `{_json(value)}", "", "refused", reason))
    for section, rows in tables.items():
        title = [] if not section else [f"### {section}\n"]
        yield "\n".join([*title, "| key | default | | meaning, or reason |", "|---|---|---|---|", *rows, ""])


def _table_of(tables: dict[str, list[str]], key: str) -> list[str]:
    section, dot, _ = key.partition(".")
    return tables.setdefault(section if dot else "", [])


def _row(*cells: str) -> str:
    key, default, kind, words = (cell.replace("|", "\\|") for cell in cells)
    return f"| `{key}` | {f'`{default}`' if default else ''} | {kind} | {words} |"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    return "" if default is PydanticUndefined else _json(default)


def _json(value: Any) -> str:
    return "sys.maxsize" if value == sys.maxsize and isinstance(value, int) else json.dumps(value)


def _names() -> Iterator[str]:
    yield "## Optimizers and schedules\n"
    yield (
        f"Optimizers, in any case of letters: {_listed(OPTIMIZERS)}, and every name of `torch.optim`.\n"
        "`Adam` means AdamW unless `adam_w_mode` is false, as in DeepSpeed. Refused:\n"
    )
    for reason in dict.fromkeys(REFUSED_OPTIMIZERS.values()):
        yield f"- {_listed([name for name, why in REFUSED_OPTIMIZERS.items() if why == reason])}: {reason}"
    yield ""
    yield "Schedules, and every name of `torch.optim.lr_scheduler`:\n"
    rows = [
        f"| `{name}` | {', '.join(_parameter(*pair) for pair in known.items())} |" for name, known in SCHEDULES.items()
    ]
    yield "\n".join(["| type | parameters |", "|---|---|", *rows, ""])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _parameter(name: str, default: Any) -> str:
    return f"`{name}` (required)" if default is REQUIRED else f"`{name}` {json.dumps(default)}"


def _spellings() -> str:
    rows = [f"| `{old}` | `{new}` | the same key |" for old, new in ALIASES.items()]
    rows += [f"| `{old}` | {new} | deprecated: a warning |" for old, new in DEPRECATED.items()]
    rows += ["| `zero_optimization`: `true`, `false` | `zero_optimization.stage` 1, 0 | deprecated: a warning |"]
    head = ["## Other spellings\n", "Two spellings of one key at once are an error.\n"]
    return "\n".join([*head, "| written | read as | |", "|---|---|---|", *rows, ""])
