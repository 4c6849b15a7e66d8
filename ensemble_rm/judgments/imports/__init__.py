"""Importing judgments: one module per format, registered here."""

from ensemble_rm.judgments.imports import argilla, jsonl, label_studio
from ensemble_rm.judgments.imports.formats import register_format

for built_in in (
    jsonl.FORMAT,
    label_studio.FORMAT,
    label_studio.MIN_FORMAT,
    argilla.FORMAT,
):
    register_format(built_in)
