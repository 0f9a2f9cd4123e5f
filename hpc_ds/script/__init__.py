"""From a checked config to the text of a job script."""
