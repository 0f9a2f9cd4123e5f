"""Pydantic at the edge: what a user writes in JSON, checked and frozen."""
