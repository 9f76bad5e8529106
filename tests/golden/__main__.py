"""Writes the golden texts anew: ``python -m tests.golden``. Read what has changed before it is committed."""

from __future__ import annotations

from tests.golden.texts import FOLDER, texts

for name, text in texts().items():
    (FOLDER / name).write_text(text)
