"""docs/sites.md, made from the site files and their model, so that it cannot say what they do not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic_core import PydanticUndefined

from hpc_ds.config.site import AccountRule, Detect, Place, SiteConfig, Source, WalltimeStep

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic.fields import FieldInfo

    from hpc_ds.config.model import Model

_HEAD = """\
# Sites

A site file says what a cluster offers and how it wants to be asked. `hpcds submit --site NAME` takes a shipped one, one in
`~/.config/hpcds/sites/NAME.json` (which comes first), or the path of a file. With the site given, one job file runs on all
of them: GPUs are asked for in the site's way, ranks get the cores of their GPUs, its modules are loaded, its network
variables set, and a job that could never start there is refused before it is queued, with the reason.

This page is made by `make docs` from the files themselves.

## The shipped sites

What was read in a site's own documents, or in a configuration that is maintained for it, counts as verified. What was only
seen in somebody's job script, is old, or is supposed, is *not verified*: it is used, never refuses a job, and is listed at
submit. Nobody has run hpc_ds on these clusters yet: a file that was corrected there is welcome.

| site | cluster | GPUs of a node | asked for by | partitions and QOS | not verified |
|---|---|---|---|---|---|
"""

_FIELDS = """
`hpcds site list` names them and yours, `site show NAME` prints what is known of one and where from, `site validate FILE`
checks files, `site detect` says which cluster this is, `site probe` asks the Slurm that answers here; each takes `--json`.
A job whose site is `auto` takes the one that `detect` finds: by the `detect` section of a file, yours first, else `slurm`
where a Slurm answers, else `local`. Of the shipped files only `alliance-canada` has such a section: of the other clusters
we do not know for certain what they call themselves.

`probe` finds partitions with their limits, nodes, cores, GPUs, preemption and grace time, QOS where there is accounting, and
the cluster's name, by which it is known from then on. The most nodes of a partition are those it has: sbatch takes a request
for more, which then waits for ever.

## Adding a site

1. `hpcds site probe --name NAME` on the cluster asks Slurm and writes `~/.config/hpcds/sites/NAME.json`; or copy the file
   of a cluster that resembles yours.
2. Add what Slurm does not know: account rule, modules, network variables, scratch. `sources` says where each comes from:
   `"sources": {"env.NCCL_NET": {"source": "docs.example.org/network", "date": "2026-08", "verified": true}}`. A source
   counts for everything below its key.
3. `hpcds site validate FILE` names what is wrong in it; `hpcds submit job.json --site NAME --dry-run` shows the script.

To ship it, put it into `site_configs/`, add a job to `tests/script/test_site_scripts.py`, and run
`UPDATE_GOLDEN=1 pytest tests/script` and `make docs`.

## Fields of a site file

A field is left out where nothing is known. The fields under *places* stand for the whole site at the top of the file, and
for one partition or QOS in `partitions` and `qos`, where they come first.
"""

_TAIL = """
## Templates

A job script is made from the template that the site names, by jinja2. A folder of templates of your own comes before the
shipped ones: `templates` in job.json (`"templates": "my_templates"`), then `~/.config/hpcds/templates/`. A file there with the
name of a shipped one takes its place; a site file may name another in `template`. It is best made of the shipped parts:

```
{% import "parts.sh.j2" as parts with context %}
#!/bin/bash
{{ parts.sbatch() -}}
export SLURM_EXPORT_ENV=ALL
{{ parts.environment() -}}
echo "on the batch host, before any module, in:" {{ workdir }}
{{ parts.prepare() -}}
{{ parts.supervise() -}}
```

| value | what it is |
|---|---|
| `options` | name -> value of every sbatch option; none: one without a value |
| `modules`, `setup` | of site and job |
| `env_file`, `workdir`, `run_dir`, `python` | paths |
| `time_limit_s`, `lead_s`, `signal`, `grace_s`, `kill_wait_s` | of site `local`, whose keeper reads them from the script |

Whatever a template prints is quoted for the shell, however it was put together, so that no name, path or value can be run;
only `setup` lines are shell already. A value that there is not is an error that names file and line.

## What becomes of the fields

- *Limits* (`walltime`, `max_nodes`, ..., `account`, `memory`, `sbatch_ntasks`): a job beyond them is refused at submit.
  Where several partitions are asked for, the first that the file knows counts.
- *GPUs*: `resources.gpus_per_node` is what a job says, everywhere; `gpu_request` makes `--gpus-per-node`, `--gres=gpu:`,
  `--gpus-per-task` or `--gpus` (of the whole job) of it.
- *Cores*: a job that does not say `resources.cpus_per_task` gets `cpus_per_gpu` for each of its GPUs. sbatch is told where
  it allows that, and srun always: some versions of Slurm do not hand it on.
- *Network*: `interfaces` become `NCCL_SOCKET_IFNAME`; `env` comes after it, and the job's own `env` last. All of it is in
  `env.sh` of the run folder (mode 0600), never on a command line. Rank 0 listens on a port of `port_range`.
- *Modules* are loaded before the `setup` lines of site and job; one that cannot be loaded ends the job.
- `requeue: "refused"`: the run goes on in a job of its own each time.
- `scratch`, `purge_days`, `internet`, `max_jobs`, `preemption`, `reserved_cpus`, `notes` are for people: `hpcds site show`.
"""


def sites_page(sites: Iterable[SiteConfig]) -> str:
    """The text of docs/sites.md."""
    rows = [_row_of(site) for site in sites]
    lines: list[str] = []
    tables: list[tuple[str, type[Model], set[str]]] = [
        ("Site", SiteConfig, set(Place.model_fields)),
        ("Places", Place, set()),
        ("`walltime`, where it is a list", WalltimeStep, set()),
        ("`account`", AccountRule, set()),
        ("`detect`", Detect, set()),
        ("`sources`, each", Source, set()),
    ]
    for title, model, without in tables:
        lines += ["", f"### {title}", "", "| field | default | meaning |", "|---|---|---|", *_rows(model, without)]
    return _HEAD + "\n".join(rows) + "\n" + _FIELDS + "\n".join(lines) + "\n" + _TAIL


def _row_of(site: SiteConfig) -> str:
    gpus = {place.gpus_per_node for place in (site, *site.partitions.values())} - {None}
    names = [f"`{name}`" for name in (*site.partitions, *site.qos)]
    unverified = ", ".join(f"`{field}`" for field in site.unverified)
    by = f"`{site.gpu_request}`" if site.scheduler == "slurm" else ""
    cells = [
        f"`{site.name}`",
        site.description,
        " or ".join(str(count) for count in sorted(filter(None, gpus))),
        by,
        ", ".join(names),
        unverified,
    ]
    return "| " + " | ".join(cells) + " |"


def _rows(model: type[Model], without: set[str]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name not in without:
            yield f"| `{name}` | {_default(field)} | {field.description or ''} |"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        value = field.default_factory()  # type: ignore[call-arg] # ours take nothing
    else:
        value = field.default
    return "required" if value is PydanticUndefined else f"`{json.dumps(value)}`"
