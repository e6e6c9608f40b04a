"""What a user did wrong, in one line with the nearest valid name. Loads nothing heavy: a slip is answered at once."""

import difflib
import dis
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_type_hints


class Mistake(Exception):
    """A mistake of the user's; its message is one line that says what to do."""


class Stopped(Exception):
    """A run that somebody has stopped; its message is one line that says how to go on.

    Args:
        line: That line.
        code: The exit code, 128 and the number of the signal.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


class Failed(Stopped):
    """Work of which some parts have failed; its message is one line that names them.

    Args:
        line: That line.
    """

    def __init__(self, line: str) -> None:
        super().__init__(f"error: {line}", 1)


def one_line(error: BaseException | str) -> str:
    """Gives an error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def nearest(given: str, names: Iterable[str], cutoff: float = 0.7) -> str:
    """Asks whether the name nearest to a wrong one was meant; empty where none is near.

    >>> nearest("LoRa", ["LoRA", "Adapter"])
    "; did you mean 'LoRA'?"
    """
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), folded, n=1, cutoff=cutoff)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


# ---- errors of a run -------------------------------------------------------------------------------------------------


def judged(error: Exception) -> tuple[str, int]:
    """Says an error in one line, and whose it is.

    Returns:
        The line, and the exit code: 2 for the user's, 1 for what looks like a bug.
    """
    if isinstance(error, Mistake):
        return f"error: {error}", 2
    if is_users(error):
        return f"error: {one_line(says(str(error))[1])} (--debug shows where)", 2
    return f"bug: {type(error).__name__}: {one_line(error)} (please report this with what --debug shows)", 1


def is_users(error: Exception) -> bool:
    """Says whether an error comes from what the user gave: one of files, or one that a check raised on purpose."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from torch import OutOfMemoryError

    if isinstance(error, OSError | ImportError | MisconfigurationException | OutOfMemoryError):
        return True
    return isinstance(error, ValueError | TypeError) and raised_on_purpose(error)


def raised_on_purpose(error: BaseException) -> bool:
    """Says whether a ``raise`` statement raised an error, and not an operation that went wrong.

    >>> try:
    ...     raise ValueError("a check")
    ... except ValueError as error:
    ...     raised_on_purpose(error)
    True
    >>> try:
    ...     (1).x + None
    ... except AttributeError as error:
    ...     raised_on_purpose(error)
    False
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


# ---- errors of the parser --------------------------------------------------------------------------------------------


def explain(message: str, sections: dict[str, type], keys: Iterable[str]) -> str:
    """Puts a parser's message in one line with the valid names.

    Args:
        message: Of jsonargparse.
        sections: The class whose arguments each section of a config holds.
        keys: All keys that there are, sections included, as in ``model.every``.
    """
    key, leaf, given = says(message)
    about = f"{key}: " if key else ""
    if found := re.match(r"unrecognized arguments: (\S+)", leaf):
        return _no_key(found[1], keys, sections)
    if found := re.match(r"(?:Subcommand|Group) '.*' does not accept option '(.+?)'", leaf):
        return _no_key("--" + found[1], keys, sections)
    if found := re.search(r"Option '(.+?)' is not accepted", leaf):
        return about + _no_setting(found[1], [*bases(key, sections)], given)
    if found := re.search(
        r"(?:string|format): (.*)$|^Import path (\S+) does not|subclass of \w+. Got value: (.*)$", leaf
    ):
        return _no_class(about, next(filter(None, found.groups())), [*bases(key, sections)])
    if found := re.match(r"the following arguments are required: (.+)", leaf):
        return _missing(key, [name.partition(".")[2] or name for name in found[1].split(", ")])
    if found := re.match(r'Linked "(.+?)"', leaf):
        return f"{found[1]} cannot be set, it comes from the data; leave it out"
    if found := re.match(r"argument (\S+): expected one argument", leaf):
        return f"{found[1].rpartition('/')[2]} needs a value"
    if found := re.match(r'Unable to load config "(.*)"', leaf):
        return f"{about}there is no config file {found[1]!r} with that section; one setting is --{key}.NAME VALUE"
    if expected := re.findall(r"Expected (?:an? )?(<class '.+?'>|\S*Literal\[.+?\])", leaf):
        got = re.search(r"Got value: (.*)$", leaf)
        if given is None or (got and "'class_path'" in given):  # that is the whole object, not the value inside
            given = got[1] if got else ""
        return _wrong_value(about, expected, given)
    return about + one_line(leaf)


def says(message: str) -> tuple[str, str, str | None]:
    r"""Digs what matters out of jsonargparse's nested message.

    >>> says('Parser key "model.every":\n  Expected a <class \'int\'>. Got value: two')
    ('model.every', "Expected a <class 'int'>. Got value: two", None)

    Returns:
        The key that the message is about, the innermost error (several types that would do in one line), and the value
        given where it is said apart from that.
    """
    text, key, given = textwrap.dedent(message).strip(), [], None
    while True:
        if found := re.match(r'Parser key "([^"]+)":[^\S\n]*\n*', text):
            key.append(found[1])
            text = textwrap.dedent(text[found.end() :]).strip()
        elif found := re.match(r"Problem with given class_path '.*':\n", text):
            text = textwrap.dedent(text[found.end() :]).strip("\n")
        elif found := re.match(r"Type .* expects a function or a callable class: (?=Parser key)", text):
            text = re.sub(r"\. Got value: Namespace\(.*", "", text[found.end() :], flags=re.DOTALL)
        elif text.startswith("- "):
            text = _most_telling(text)
        elif text.startswith("Does not validate against any of the Union subtypes") and "Errors:\n" in text:
            errors, _, value = text.partition("Errors:\n")[2].partition("\nGiven value type:")
            value = value.partition("Given value: ")[2].strip()
            nested = re.fullmatch(r"NestedArg\(key='.+', val=(.*)\)", value)
            given = nested[1].strip("'") if nested else value
            text = _most_telling(textwrap.dedent(errors).strip("\n"))
        else:
            return ".".join(key), text.partition("\nSubclass types expect")[0], given


def _most_telling(bullets: str) -> str:
    """Chooses among the errors of a union's members; where each names a type, all of them count."""
    items = [textwrap.dedent("  " + item).strip() for item in re.split(r"^- ", bullets, flags=re.MULTILINE)[1:]]
    items = [item for item in items if not re.match(r"Expected a <class 'NoneType'>|Expected a path but", item)]
    if any(re.match(r"Expected a <class '(int|float)'>", item) for item in items):  # a number or something rare
        items = [item for item in items if not item.startswith("Expected a dot import path")]
    telling = [item for item in items if not re.match(r"Expected (a )?(<class|\S*Literal)", item)]
    return telling[0] if telling else "; ".join(items)


def _no_key(given: str, keys: Iterable[str], sections: dict[str, type]) -> str:
    if not given.startswith("--"):
        return f"{given!r} belongs to no setting; settings are given as --KEY VALUE"
    key, keys = given[2:].partition("=")[0], list(keys)
    section, _, rest = key.partition(".")
    beside = [k for k in keys if k.startswith(f"{section}.{rest[:4]}")]  # a slip at the end of a name at this level
    if hint := nearest(key, beside):
        return f"there is no key {key!r}{hint}"
    if inner := next((k for k in keys if k.startswith(f"{section}.") and rest in _settings(k, sections)), None):
        return f"there is no key {key!r}; did you mean '{inner}.{rest}'?"
    longer = [k for k in keys if k.startswith(key) and len(key) > 2]  # it was cut short
    if hint := nearest(key, keys) or (f"; did you mean {longer[0]!r}?" if len(longer) == 1 else ""):
        return f"there is no key {key!r}{hint}"
    inside = [name.partition(".")[2] for name in keys if name.startswith(f"{section}.")]
    if inside:
        return f"there is no key {key!r}; {section} has: {', '.join(inside)}"
    return f"there is no key {key!r}; choose from {', '.join(sections or keys)}"


def _settings(key: str, sections: dict[str, type]) -> set[str]:
    """Names the settings of the classes that a key takes."""
    return {name for base in bases(key, sections) for cls in subclasses(base) for name in parameters(cls)}


def _no_setting(given: str, candidates: list[type], value: str | None) -> str:
    if given in ("class_path", "init_args"):
        return "class_path takes only init_args beside it, as in {class_path: LoRA, init_args: {rank: 8}}"
    named = re.search(r"class_path(?:=|': )'(?:[\w.]*\.)?(\w+)'", value or "")
    chosen = [cls for base in candidates for cls in subclasses(base) if not named or cls.__name__ == named[1]]
    settings = list(dict.fromkeys(name for cls in chosen for name in parameters(cls)))
    if named and named[1] in {cls.__name__ for cls in chosen}:
        hint = nearest(given, settings)
        return f"{named[1]} has no setting {given!r}{hint or '; it has: ' + ', '.join(settings)}"
    return f"there is no setting {given!r}{nearest(given, [*settings, 'class_path', 'init_args'])}"


def _no_class(about: str, given: str, candidates: list[type]) -> str:
    choices = sorted({cls.__name__ for base in candidates for cls in subclasses(base)})
    hint = nearest(given.rpartition(".")[2], choices)
    if "Constant" in choices and re.fullmatch(r"-?[\d.]+(e-?\d+)?", given):
        hint = f"; a fixed number is {{class_path: Constant, init_args: {{value: {given}}}}}."
    line = f"{about.rstrip(': ') or 'a class'} cannot be {given!r}{hint}"
    if hint and len(choices) > 20:
        return line
    return f"{line}{' There' if hint else '; there'} are {', '.join(choices)}"


def _missing(key: str, names: list[str]) -> str:
    if names == ["data"]:
        way = "give a config file with a data section, or --data, such as --data Digits"
        return f"data is missing; {way}; all commands but fit take it from --ckpt_path, too"
    line = f"{' and '.join(names)} must be given"
    return f"{key}: {line}, as in {' '.join(f'--{key}.{name} ...' for name in names)}" if key else line


TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping such as {depth: 6}",
    "list": "a list such as [3, 6]",
    "tuple": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
}


def _wrong_value(about: str, expected: list[str], given: str) -> str:
    words: list[str] = []
    choices: list[str] = []
    for kind in expected:
        if kind.startswith("<"):
            name = kind.rpartition("'")[0].rpartition("'")[2].rpartition(".")[2]
            words.append(TYPES.get(name, name))
        else:
            choices += [choice.strip().strip("'") for choice in kind.partition("[")[2].rstrip("]").split(",")]
    if choices:
        words.insert(0, f"one of {', '.join(dict.fromkeys(choices))}")
    return f"{about}expected {' or '.join(words)}, not {given!r}{nearest(given, choices)}"


# ---- what there is ---------------------------------------------------------------------------------------------------


def bases(key: str, sections: dict[str, type]) -> Iterator[type]:
    """Yields the classes whose subclasses a key may name; those of all keys where that one is not known."""
    from dynadapter.spec import Spec

    section, _, rest = key.partition(".")
    if section in sections and not rest:
        yield sections[section]
    elif section in sections:
        yield from _classes_in(_hints(sections[section]).get(rest.rpartition(".")[2]))
    elif key:  # an argument of a class inside another's
        yield from {cls for home in subclasses(Spec) for cls in _classes_in(_hints(home).get(key))}
    else:
        yield from {cls for home in sections.values() for hint in _hints(home).values() for cls in _classes_in(hint)}
        if "data" in sections:
            yield sections["data"]


def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls.__init__)  # type: ignore[misc]  # of this very class


def _classes_in(hint: Any) -> Iterator[type]:
    """Yields the classes of configuration objects in a type hint."""
    parts = hint if isinstance(hint, list) else get_args(hint)
    if parts:
        for part in parts:
            yield from _classes_in(part)
    elif isinstance(hint, type) and hint.__module__.partition(".")[0] in ("dynadapter", "lightning", "torch"):
        yield hint


def subclasses(cls: type) -> Iterator[type]:
    """Yields the concrete classes from a class downwards that a config can name."""
    if not cls.__name__.startswith("_") and not inspect.isabstract(cls):
        yield cls
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield from subclasses(child)


def parameters(cls: type) -> Iterator[str]:
    """Yields the names of a class's arguments, those that it hands on to its bases included."""
    for parent in cls.__mro__:
        if "__init__" in vars(parent):
            for name, parameter in inspect.signature(vars(parent)["__init__"]).parameters.items():
                if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    yield name
