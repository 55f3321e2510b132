"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

from rayprism.models.fields import REPOSITORY_VARIABLE

# How long an example takes is the machine's business, which may be a busy one.
settings.register_profile("without-deadline", settings(), deadline=None)
settings.load_profile("without-deadline")

# The Makefile and a developer's shell name the demo's models, which no test is about.
os.environ.pop(REPOSITORY_VARIABLE, None)
