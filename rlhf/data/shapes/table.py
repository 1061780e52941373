"""Every shape whose rows convert one by one, by its name in params."""

from __future__ import annotations

from rlhf.data.shapes import chats, comparisons, helpsteer, instructions, questions, ultrafeedback
from rlhf.data.shapes.forms import Form

FORMS: dict[str, Form] = {
    **helpsteer.FORMS,
    **ultrafeedback.FORMS,
    **comparisons.FORMS,
    **chats.FORMS,
    **instructions.FORMS,
    **questions.FORMS,
}
