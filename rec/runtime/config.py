"""Recipes: YAML files and ``key=value`` overrides, checked against typed sections before anything heavy starts."""

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from rec.runtime.errors import UserError


class Section(BaseModel):
    """Base of every configuration section: immutable, unknown keys are errors, docstrings under fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    placement: ClassVar[tuple[str, ...]] = ()
    """Dotted keys that say on how many processes the job runs: a run may go on with other values."""
    selection: ClassVar[tuple[str, ...]] = ()
    """Dotted keys of a study that say which of its parts are done: each part has a run folder, which claims its recipe,
    so a study may go on with more seeds or without a variant."""


AnySection = TypeVar("AnySection", bound=Section)

BOOL, FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Booleans and numbers as in YAML 1.2: ``on`` is a word, so that a key may be called so, and 1e-3 is a number."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (BOOL, FLOAT)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(r"^(?:[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a YAML recipe.

    Raises:
        UserError: if the file is missing, is not YAML, or does not hold a mapping.
    """
    if not path.is_file():
        raise UserError(f"recipe not found: {path}")
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML recipe: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a recipe: expected 'key: value' lines at the top level")
    return content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``content`` with dotted ``key=value`` overrides applied; values are parsed as YAML."""
    result = copy.deepcopy(content)
    for override in overrides:
        dotted, separator, value = override.partition("=")
        if not separator or not dotted:
            raise UserError(f"override {override!r} is not of the form key=value")
        *parents, leaf = _keys(result, dotted)
        target = result
        for key in parents:
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
            if not isinstance(target, dict):
                raise UserError(f"override {override!r}: {key!r} is a value, not a section")
        try:
            target[leaf] = _parse(value)
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: the value is not valid YAML") from error
    return result


def _keys(content: Any, dotted: str) -> list[str]:
    """Of every section on the way; one that is there and has dots itself (``variants.1.7M``) is not taken apart."""
    parts, keys, there = dotted.split("."), [], content
    while parts:
        known = there if isinstance(there, dict) else {}
        size = next((size for size in range(len(parts), 1, -1) if ".".join(parts[:size]) in known), 1)
        keys.append(".".join(parts[:size]))
        parts, there = parts[size:], known.get(keys[-1])
    return keys


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)


def build(section: type[AnySection], content: dict[str, Any]) -> AnySection:
    """Validate ``content`` against ``section``.

    Raises:
        UserError: one line that names the key, the section and, for a typo, the nearest valid key.
    """
    try:
        return section.model_validate(content)
    except ValidationError as error:
        problems = error.errors()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(_one_line(section, problems[0]) + more) from None


def load(section: type[AnySection], path: Path, overrides: Sequence[str] = ()) -> AnySection:
    """Read, override and validate a recipe file."""
    return build(section, apply_overrides(read_recipe(path), overrides))


def to_yaml(section: Section) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def without(content: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A copy of ``content`` that lacks the dotted ``keys``."""
    result = copy.deepcopy(content)
    for dotted in keys:
        *parents, leaf = dotted.split(".")
        target: Any = result
        for key in parents:
            target = target.get(key) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target.pop(leaf, None)
    return result


def leave_out_nulls(content: dict[str, Any], recipe: dict[str, Any], section: str) -> dict[str, Any]:
    """``content`` without the null entries of ``section``: an override leaves out one of ``recipe``'s by that.

    Raises:
        UserError: naming one that the recipe does not have, for it may be misspelt.
    """
    given, known = content.get(section), recipe.get(section) or {}
    if not isinstance(given, dict):
        return content
    kept = {name: own for name, own in given.items() if own is not None}
    if strange := [name for name in given if name not in kept and name not in known]:
        raise UserError(f"{section}.{strange[0]}=null: there is none to leave out; there are: {', '.join(known)}")
    return {**content, section: kept}


def hash_of(content: Any) -> str:
    """The first 16 hex digits of the SHA-256 of ``content``'s canonical JSON form."""
    if isinstance(content, Section):
        content = content.model_dump(mode="json")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _one_line(root: type[Section], problem: ErrorDetails) -> str:
    location, section = _where(root, [str(part) for part in problem["loc"]] or ["recipe"])
    *parents, leaf = location
    where = ".".join(parents) or "the recipe"
    if problem["type"] == "extra_forbidden":
        valid = list(section.model_fields) if section else []
        # "lr_rate" means "lr", which is too short for a ratio of letters to see.
        near = [key for key in valid if leaf.startswith(key) or key.startswith(leaf)]
        near = near or difflib.get_close_matches(leaf, valid, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key {leaf!r} in {where}; {hint}"
    if problem["type"] == "missing":
        return f"missing key {leaf!r} in {where}"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        key = str(context["discriminator"]).strip("'")
        return f"{'.'.join(location)}.{key}: {context['tag']!r} is none of {context['expected_tags']}"
    # A whole section would hide what is said about it.
    got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    return f"{'.'.join(location)}: {problem['msg']}{got}"


def _where(root: type[Section], path: list[str]) -> tuple[list[str], type[Section] | None]:
    """The keys that a user wrote, and the section that holds the last one.

    For a section that is one of several kinds, pydantic puts the kind's name into the path; no user wrote that.
    """
    written, section, choices = [], root, [root]
    for key in path:
        if len(choices) > 1 and (chosen := _tagged(choices, key)):
            choices = [chosen]
            continue
        section = choices[0] if choices else None
        field = section.model_fields.get(key) if section else None
        choices = _sections_of(field.annotation) if field else []
        written.append(key)
    return written, section


def _tagged(choices: list[type[Section]], tag: str) -> type[Section] | None:
    """The section whose name (the one value that its first field may have) is ``tag``."""
    for choice in choices:
        first = next(iter(choice.model_fields.values()))
        if tag in get_args(first.annotation):
            return choice
    return None


def _sections_of(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for part in get_args(annotation) for section in _sections_of(part)]
