"""Batch jobs against plain loops: how fast they are, and how much memory they take."""
