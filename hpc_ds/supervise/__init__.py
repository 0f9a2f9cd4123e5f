"""The batch-side half of a run: starts ranks, learns why they stopped, decides what happens next. Never imports torch."""
