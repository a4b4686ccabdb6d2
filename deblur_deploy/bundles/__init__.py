"""Bundles: where they lie, what is in them, and how one comes from a URL."""
