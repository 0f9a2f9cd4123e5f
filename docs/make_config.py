"""Write docs/config.md anew (``make docs``)."""

from pathlib import Path

from hpc_ds.config.table import config_page

if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(config_page(), encoding="utf-8")
