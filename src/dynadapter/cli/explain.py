"""Explain a message of the parser in one line, with the nearest valid name. The parser's own messages are nested."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from dynadapter.cli.errors import closest, meant, nearest, one_line
from dynadapter.cli.help import SHORT

Sections = Mapping[str, type]
"""The class whose arguments each section of a config holds."""


class ParserError(NamedTuple):
    """The parsed content of a nested message of jsonargparse.

    Args:
        key: The dotted key, such as ``model.every``; empty if the message names none.
        text: The innermost message. For a union of types, their messages joined.
        value: The given value, if the message shows it separately from the text.
    """

    key: str
    text: str
    value: str | None = None


def innermost(message: str) -> ParserError:
    r"""Return the innermost of jsonargparse's nested messages.

    >>> innermost('Parser key "model.every":\n  Expected a <class \'int\'>. Got value: two')
    ParserError(key='model.every', text="Expected a <class 'int'>. Got value: two", value=None)
    """
    text, keys, value = textwrap.dedent(message).strip(), [], None
    while True:
        if found := re.match(r'Parser key "([^"]+)":[^\S\n]*\n*', text):
            keys.append(found[1])
            text = textwrap.dedent(text[found.end() :]).strip()
        elif found := re.match(r"Problem with given class_path '.*':\n", text):
            text = textwrap.dedent(text[found.end() :]).strip("\n")
        elif found := re.match(r"Type .* expects a function or a callable class: (?=Parser key)", text):
            text = re.sub(r"\. Got value: Namespace\(.*", "", text[found.end() :], flags=re.DOTALL)
        elif found := re.match(r"Call to compute_fn of link .* failed: ", text, flags=re.DOTALL):
            text = text[found.end() :]
        elif text.startswith("- "):
            text = _most_specific(text)
        elif text.startswith("Does not validate against any of the Union subtypes") and "Errors:\n" in text:
            errors, _, value = text.partition("Errors:\n")[2].partition("\nGiven value type:")
            value = value.partition("Given value: ")[2].strip()
            nested = re.fullmatch(r"NestedArg\(key='.+', val=(.*)\)", value)
            value = nested[1].strip("'") if nested else value
            text = _most_specific(textwrap.dedent(errors).strip("\n"))
        else:
            return ParserError(".".join(keys), text.partition("\nSubclass types expect")[0], value)


def _most_specific(bullets: str) -> str:
    """Return the most specific error of a union's types; if each only names a type, all of them."""
    items = [textwrap.dedent("  " + item).strip() for item in re.split(r"^- ", bullets, flags=re.MULTILINE)[1:]]
    items = [item for item in items if not re.match(r"Expected a <class 'NoneType'>|Expected a path but", item)]
    if any(re.match(r"Expected a <class '(int|float)'>", item) for item in items):  # a number, or rarely a class
        items = [item for item in items if not item.startswith("Expected a dot import path")]
    specific = [item for item in items if not re.match(r"Expected (a )?(<class|\S*Literal)", item)]
    return specific[0] if specific else "; ".join(items)


def explain(message: str, sections: Sections, keys: Iterable[str]) -> str:
    """Return a message of jsonargparse as one line with the valid names."""
    error, keys = innermost(message), [key for key in keys if not key.endswith(".help")]
    text = re.sub(r"^Group '(.+?)' does not accept option '(.+?)'.*", r"unrecognized arguments: --\1.\2", error.text)
    if not error.key:
        text = re.sub(r"^Option '(.+?)' is not accepted.*", r"unrecognized arguments: --\1", text)
    error = error._replace(text=text)
    for pattern, rule in RULES:
        if found := re.search(pattern, error.text):
            return rule(error, next(filter(None, found.groups()), ""), sections, keys)
    return _about(error) + one_line(error.text)


def _about(error: ParserError) -> str:
    return f"{error.key}: " if error.key else ""


# ---- one rule for each kind of message -------------------------------------------------------------------------------


def _unknown_key(error: ParserError, given: str, sections: Sections, keys: list[str]) -> str:
    if not given.startswith("--"):
        return _stray(given, keys)
    key = given.removeprefix("--").partition("=")[0]
    if key in SHORT and key in keys:  # on the command line it has become the long key
        return f"{key!r} is short for {SHORT[key][0]!r} on the command line; give the long key in a config file"
    section, _, rest = key.partition(".")
    inside = [name for name in keys if name.startswith(f"{section}.")]
    last = rest or key
    similar = closest(rest, [name.partition(".")[2] for name in inside])
    near = closest(section, sections) if rest and not inside else None
    begun = [name for name in keys if name.startswith(f"{key}_") and "." not in name]
    exact = [name for name in keys if name.rpartition(".")[2] == key]
    homes = inside or [name for name in keys if name.startswith("model.")]
    deeper = [
        f"{name}.{last}"
        for name in homes
        if any(last in parameters(cls) for cls in _classes_below(bases(name, sections)))
    ]
    found = [*([f"{section}.{similar}"] if similar else []), *([f"{near}.{rest}"] if near else []), *begun, *exact]
    if name := next(iter([*found, *deeper]), None if inside else closest(key, keys)):
        return f"there is no key {key!r}{meant(name)}"
    if inside:
        return f"there is no key {key!r}; {section} has: {', '.join(name.partition('.')[2] for name in inside)}"
    return f"there is no key {key!r}; choose from {', '.join(sections or keys)}"


def _stray(given: str, keys: list[str]) -> str:
    """Explain a value without a key by its form."""
    name, path, way = given.lstrip("-").partition("=")[0], Path(given), "settings are given as --KEY VALUE"
    if near := closest(name, keys):
        way = f"did you mean '--{near}'?"
    elif path.suffix in (".yaml", ".yml") and "config" in keys:
        way = f"a config file is given as -c {given}"
    elif path.suffix == ".ckpt" and "ckpt_path" in keys:
        way = f"a checkpoint is given as --ckpt_path {given}"
    elif (path / "config.json").is_file() and "bundle" in keys:
        way = f"a bundle is given as --bundle {given}"
    elif path.is_dir() and "images" in keys:
        way = f"a folder of images is given as --images {given}"
    elif path.is_dir() and "data" in keys:
        way = f"a folder of images is given as --data ImageFolder --data.root {given}"
    return f"{given!r} belongs to no setting; {way}"


def _unknown_setting(error: ParserError, given: str, sections: Sections, keys: list[str]) -> str:
    if given in ("class_path", "init_args"):
        line = "class_path takes only init_args beside it, as in {class_path: LoRA, init_args: {rank: 8}}"
        return _about(error) + line
    classes = list(_classes_below(bases(error.key, sections)))
    named = re.search(r"class_path(?:=|': )'(?:[\w.]*\.)?(\w+)'", error.value or "")
    chosen = [cls for cls in classes if not named or cls.__name__ == named[1]]
    settings = list(dict.fromkeys(name for cls in chosen for name in parameters(cls)))
    if named and chosen:
        hint = nearest(given, settings) or f"; it has: {', '.join(settings)}"
        return f"{_about(error)}{named[1]} has no setting {given!r}{hint}"
    owners = [cls.__name__ for cls in classes if given in parameters(cls)]
    if owners:
        has = "has it" if len(owners) == 1 else "have it"
        return f"{_about(error)}the class given has no setting {given!r}; {', '.join(owners[:5])} {has}"
    hint = nearest(given, (*settings, "class_path", "init_args"))
    return f"{_about(error)}there is no setting {given!r}{hint or f'; --{error.key}.help CLASS lists those of a class'}"


def _unknown_class(error: ParserError, given: str, sections: Sections, keys: list[str]) -> str:
    choices = sorted({cls.__name__ for cls in _classes_below(bases(error.key, sections))})
    hint = nearest(given.rpartition(".")[2], choices)
    if "Constant" in choices and re.fullmatch(r"-?[\d.]+(e-?\d+)?", given):
        hint = f"; a fixed number is {{class_path: Constant, init_args: {{value: {given}}}}}."
    line = f"{error.key or 'a class'} cannot be {given!r}{hint}"
    if len(choices) == 1:
        return line if hint else f"{line}; the only one is {choices[0]}"
    if hint and len(choices) > 20:
        return line
    return f"{line}{' There' if hint else '; there'} are {', '.join(choices)}"


def _no_class(error: ParserError, given: str, sections: Sections, keys: list[str]) -> str:
    choices = sorted({cls.__name__ for cls in _classes_below(bases(error.key, sections))})
    way = f"give --{error.key or 'KEY'} CLASS before its settings, or class_path in a config file"
    return f"{_about(error)}the class is missing or abstract; {way}; there are {', '.join(choices)}"


def _missing(error: ParserError, given: str, sections: Sections, keys: list[str]) -> str:
    names = [name.partition(".")[2] or name for name in given.split(", ")]
    if names == ["data"]:
        way = "give a config file with a data section, or --data, such as --data Shapes"
        also = "; every command except fit also takes it from --ckpt_path" if "ckpt_path" in keys else ""
        return f"data is missing; {way}{also}"
    line = f"{' and '.join(f'--{name}' if name in keys else name for name in names)} must be given"
    return (
        f"{error.key}: {line}, as in {' '.join(f'--{error.key}.{name} ...' for name in names)}" if error.key else line
    )


def _no_section_file(error: ParserError, given: str, sections: Sections, keys: list[str]) -> str:
    line = f"there is no config file {given!r} with that section; one setting is --{error.key}.NAME VALUE"
    return f"{_about(error)}{line}, and null switches off what can be switched off"


def _wrong_type(error: ParserError, given: str, sections: Sections, keys: list[str]) -> str:
    value, got = error.value, re.search(r"Got value: (.*)$", error.text)
    if value is None or (got and "'class_path'" in value):  # that is the whole object, not the value inside
        value = got[1] if got else ""
    words: list[str] = []
    choices: list[str] = []
    for kind in re.findall(_TYPE, error.text):
        if kind.startswith("<"):
            name = kind.rpartition("'")[0].rpartition("'")[2].rpartition(".")[2]
            words.append(TYPES.get(name, name))
        else:
            choices += [choice.strip().strip("'") for choice in kind.partition("[")[2].rstrip("]").split(",")]
    if choices:
        words.insert(0, f"one of {', '.join(dict.fromkeys(choices))}")
    kinds = " or ".join(words)
    if re.fullmatch(r"[\w.,-]+", value):
        kinds = kinds.replace(LIST, f"[{value}]")
    return f"{_about(error)}expected {kinds}, not {value!r}{nearest(value, choices)}"


_TYPE = r"Expected (?:an? )?(<class '.+?'>|\S*Literal\[.+?\])"
LIST = "[3, 6]"
"""A list as an example, if the given value is not one without brackets."""
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping such as {depth: 6}",
    "list": f"a list such as {LIST}",
    "tuple": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
}
RULES: tuple[tuple[str, Callable[[ParserError, str, Sections, list[str]], str]], ...] = (
    (r"^unrecognized arguments: (\S+)", _unknown_key),
    (r"Option '(.+?)' is not accepted", _unknown_setting),
    (r"(?:string|format): (.*)$|^Import path (\S+) does not|subclass of \w+. Got value: (.*)$", _unknown_class),
    (r"^Expected an instantiatable class, but .*is abstract|^Not a valid subclass of \w+$", _no_class),
    (r"^the following arguments are required: (.+)", _missing),
    (r'^Linked "(.+?)"', lambda _, given, *__: f"{given} cannot be set, it comes from the data; leave it out"),
    (r"^argument (\S+): expected one argument", lambda _, given, *__: f"{given.rpartition('/')[2]} needs a value"),
    (r"""^Unable to load config ["'](.*?)["']""", _no_section_file),
    (_TYPE, _wrong_type),
)
"""A pattern in the innermost message, and the rule that explains its first group."""


# ---- the classes that a key may name ---------------------------------------------------------------------------------


def bases(key: str, sections: Sections) -> Iterator[type]:
    """Yield the classes whose subclasses a key may name; for an unknown key, the classes of all keys."""
    from dynadapter.spec import Spec

    section, _, rest = key.partition(".")
    if section in sections and not rest:
        yield sections[section]
    elif section in sections:
        yield from classes_in(_hints(sections[section]).get(rest.rpartition(".")[2]))
    elif key:  # an argument of a class inside another's
        yield from {cls for home in subclasses(Spec) for cls in classes_in(_hints(home).get(key))}
    else:
        yield from {cls for home in sections.values() for hint in _hints(home).values() for cls in classes_in(hint)}
        if "data" in sections:
            yield sections["data"]


def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls.__init__)  # type: ignore[misc]  # of this very class


def classes_in(hint: Any) -> Iterator[type]:
    """Yield the classes of configuration objects in a type hint."""
    parts = hint if isinstance(hint, list) else get_args(hint)
    if parts:
        for part in parts:
            yield from classes_in(part)
    elif isinstance(hint, type) and hint.__module__.partition(".")[0] in ("dynadapter", "lightning", "torch"):
        yield hint


def _classes_below(found: Iterable[type]) -> Iterator[type]:
    for base in found:
        yield from subclasses(base)


def subclasses(cls: type) -> Iterator[type]:
    """Yield the concrete subclasses of a class that a config can name, including the class."""
    if not cls.__name__.startswith("_") and not inspect.isabstract(cls):
        yield cls
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield from subclasses(child)


def parameters(cls: type) -> Iterator[str]:
    """Yield the names of a class's arguments, including those that it passes to its bases."""
    for parent in cls.__mro__:
        if "__init__" in vars(parent):
            for name, parameter in inspect.signature(vars(parent)["__init__"]).parameters.items():
                if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    yield name
