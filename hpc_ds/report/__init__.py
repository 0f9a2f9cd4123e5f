"""Runs as a person reads them: from their ledgers and events, and one question to the scheduler for all of them."""
