"""``job.json`` of a run: which job it is now, and which it was before. Light: the supervisor needs it and not the templates."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hpc_ds.run_dir import read_object, write_json

if TYPE_CHECKING:
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.run_dir import RunDir


def note_job(run: RunDir, site: SiteConfig, job_id: str, *, durable: bool = True) -> None:
    """Write down which job a run is now. Submitter and job both do: the first one counts.

    Args:
        run: whose file.
        site: that the job was made for.
        job_id: of the job.
        durable: whether it must outlive a power cut; its supervisor writes it again.
    """
    before = read_object(run.job)
    if before.get("job_id") == job_id:
        return
    earlier = [*before.get("earlier", []), before["job_id"]] if before.get("job_id") else []
    now = time.time()
    queued = {**before.get("queued", {}), job_id: now}
    data = {"job_id": job_id, "site": site.name, "submitted": now, "earlier": earlier, "queued": queued}
    write_json(run.job, data, durable=durable)
