"""Texts that are sent to servers: what a chat template refuses is an error of its sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_rm import Message, Sample
from ensemble_rm.errors import TemplateError
from ensemble_rm.members.backbone.checkpoint import load_tokenizer
from ensemble_rm.members.remote.request_text import Renderer


def test_a_templates_refusal_names_the_sample(minilm_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(minilm_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    renderer = Renderer("chat", tokenizer=tmp_path, strips_bos=False)
    system = (Message("system", "Be brief."), Message("user", "Hi"))
    with pytest.raises(TemplateError, match=r"'Be brief\.': System role not supported"):
        renderer.render([Sample("Hi", "a"), Sample(system, "a")])
    (rendered,) = renderer.render([Sample("Hi", "a")])
    assert rendered.text == "user: Hi\nassistant: a\n"
