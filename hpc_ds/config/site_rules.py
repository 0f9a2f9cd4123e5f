"""Whether a job fits a site."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig


def check_job(job: JobConfig, site: SiteConfig) -> list[str]:  # noqa: ARG001
    """What is worth saying about a job on a site."""
    return []
