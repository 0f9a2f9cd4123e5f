"""Write docs/config.md and docs/sites.md anew (``make docs``)."""

from pathlib import Path

from hpc_ds.config.load import load_site
from hpc_ds.config.site_table import sites_page
from hpc_ds.config.table import config_page
from hpc_ds.shipped import shipped

if __name__ == "__main__":
    here = Path(__file__)
    here.with_name("config.md").write_text(config_page(), encoding="utf-8")
    sites = [load_site(str(path)) for path in sorted(shipped("site_configs").glob("*.json"))]
    here.with_name("sites.md").write_text(sites_page(sites), encoding="utf-8")
