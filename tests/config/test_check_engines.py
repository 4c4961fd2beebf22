"""`hemostat check` with several engines: one that differs from the first is named."""

from __future__ import annotations
