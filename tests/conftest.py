"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes is the machine's business, which may be a busy one.
settings.register_profile("without-deadline", settings(), deadline=None)
settings.load_profile("without-deadline")
