"""Labelled rows as prompts: a template with the row's texts in it, and a word for its class behind it."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

from engines.errors import UserError
from harness.data.records import LabelledExample
from harness.data.token_tables import TokenTable, prompt_table
from harness.models.candidates import Candidates
from harness.models.tokenizers import Tokenizer

FIELDS = ("text", "text2")


def check_template(template: str, *, is_paired: bool) -> None:
    """Raises `UserError` for a template that does not say where the row's texts belong."""
    try:
        named = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError("--template", f"{error}", "write {{ for a brace") from None
    unknown = [name for name in named if name not in FIELDS]
    if unknown or "text" not in named:
        why = f"{{{unknown[0]}}} is no text of a row" if unknown else "does not say where the text belongs"
        raise UserError("--template", why, "use {text}, and {text2} for the second of a pair")
    if is_paired != ("text2" in named):
        why = "leaves out the second text of each row" if is_paired else "names a second text, rows have one"
        raise UserError("--template", why, "use {text2}" if is_paired else "leave out {text2}")


def rendered(template: str, row: LabelledExample) -> str:
    """The prompt of a row. A line break is written as it is, or as backslash n."""
    return template.replace("\\n", "\n").format(text=row.text, text2=row.second or "")


def template_table(
    rows: Sequence[LabelledExample],
    template: str,
    candidates: Candidates,
    tokenizer: Tokenizer,
    seq_len: int,
) -> TokenTable:
    """A row's prompt without loss, then the token of its class with it. Long prompts lose their beginning."""
    encoded = tokenizer.encode([rendered(template, row) for row in rows])
    prompts = [[*ids, *candidates.shared] for ids in encoded]
    return prompt_table(prompts, [[candidates.tokens[row.label]] for row in rows], tokenizer, seq_len)
