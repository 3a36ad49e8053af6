"""Items as text, and the prompts that ask an LLM about them."""

import re
import string

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from llm.tokenizer import token_ids
from rec.runtime.errors import UserError

# After Figure 3 and section 4.2 of SeRALM: descriptive knowledge and whom the item attracts.
TEMPLATES = {
    "movies": (
        "Here is a movie: {item}. Describe its plot, cast and themes in a few sentences,"
        " then say which viewers enjoy it and why."
    ),
    "books": (
        "Here is a book: {item}. Describe its subject, style and setting in a few sentences,"
        " then say which readers enjoy it and why."
    ),
    "business": (
        "Here is a local business: {item}. Describe what it offers and what a visit is like in a few sentences,"
        " then say which customers go there and what else they like."
    ),
    "retail": (
        "Here is a product of a shop: {item}. Describe what it is and how it is used in a few sentences,"
        " then say which customers buy it and what else they like."
    ),
}
NO_TEXT = "unknown item"


def item_texts(items: pa.Table, template: str) -> list[str]:
    """One line of text for every row of ``items``.

    Empty fields leave no debris: "{title} ({year}), {genres}" without a year and genres gives the title alone,
    "{title}, {brand}, {category}" without a brand one comma.

    Raises:
        UserError: if the template names a column that is not there.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"llm.item_text is no template: {error}: {template!r}") from None
    for name in fields:
        require_column(items, name, "llm.item_text")
    rows = items.select(list(dict.fromkeys(fields))).to_pylist()
    try:
        return [_tidy(template.format_map(row)) or NO_TEXT for row in rows]
    except (ValueError, TypeError) as error:  # of a format or a conversion that columns do not have
        raise UserError(f"llm.item_text: {error}: {template!r}") from None


def require_column(items: pa.Table, name: str, asked_by: str) -> None:
    """Raise a UserError if ``items`` has no such column; ``asked_by`` is the key of the recipe that names it."""
    if name not in items.column_names:
        raise UserError(f"{asked_by} names {name!r}, the prepared items have: {', '.join(items.column_names)}")


def prompt_tokens(texts: list[str], prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompt about each item; with the tokenizer's chat template if it has one."""
    template = TEMPLATES.get(prompt, prompt)
    if "{item}" not in template:
        raise UserError(f"llm.knowledge.prompt has no {{item}}; write one, or name one of {', '.join(TEMPLATES)}")
    prompts = [template.replace("{item}", text) for text in texts]
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": text}] for text in prompts]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        return token_ids(tokenizer, prompts, special=False)
    return token_ids(tokenizer, prompts)


def _tidy(text: str) -> str:
    text = re.sub(r"\(\s*\)|\[\s*\]", "", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"([,;:|-] )([,;:|-] )+", r"\1", text)
    text = re.sub(r" +(?=[,;])", "", text)
    return re.sub(r"(\s*[,;:|-]\s*)+$|^(\s*[,;:|-]\s*)+", "", text).strip()
