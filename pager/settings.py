"""One way of reading settings, for every command: flag, then environment, then TOML file, then default.

A settings class is a frozen dataclass whose field names are the names in the file. A field that is itself such a dataclass
is a table of the file. Nothing here knows a single setting; config.py and daemon/settings.py name them. Guards: no value
is dropped in silence. A name that nobody knows is an error that says the nearest known one and where it was read.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..tiers.errors import ConfigError

ENV_PREFIX = "KVTIER_"
MASK = "***"
MAX_FILE_BYTES = 1 << 20
_NEAR = 0.6  # of difflib: finds a letter left out, doubled or swapped
_NEAR_IN_ENVIRONMENT = 0.85  # the environment is everybody's: only what is nearly ours is taken for a slip
_OTHERS = frozenset({"debug"})  # KVTIER_DEBUG is read by the kernels, at each call

T = TypeVar("T")


def read_settings(
    kind: type[T],
    path: str | os.PathLike[str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    also_known: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """A settings object of this class; what it means is checked by its own `validate`.

    `also_known` are names that a file shared with another command may hold; they are left to it. `defaults` are a
    command's own, below file and environment. An override of None is not given.
    Raises: ConfigError naming where a setting was read, its value, and what would do.
    """
    values = dict(defaults or {})
    if path is not None:
        values |= check_names(read_toml(Path(path)), kind, also_known, where=f"config file {path}")
    values = _merged(values, _read_environment(kind, os.environ if env is None else env))
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    values = _merged(values, check_names(given, kind, (), where="arguments"))
    return make(kind, values)


def make(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The dataclass of these values, tables made into the dataclasses that their fields name. Raises ConfigError."""
    hints = _hints(kind)
    made = {name: _typed(f"{where}{name}", value, hints[name]) for name, value in values.items()}
    try:
        return kind(**made)
    except TypeError as error:
        missing = re.findall(r"'(\w+)'", str(error))
        raise ConfigError(f"{where}{' and '.join(missing) or error} is missing: say what it shall be") from None


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field's type has it: tables made, lists as tuples. Raises ConfigError for another type."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        base: Any = get_origin(kind) or kind
        if isinstance(base, type) and is_dataclass(base):
            return value if isinstance(value, base) else _made(base, value, name)
        if base is Mapping and isinstance(value, Mapping):
            inner = get_args(kind)[1]
            return {key: _typed(f"{name}.{key}", item, inner) for key, item in value.items()}
        if base is tuple and isinstance(value, list | tuple):
            return tuple(_typed(name, item, get_args(kind)[0]) for item in value)
        if base is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, base) and not (isinstance(value, bool) and base is not bool):
            return value
    wanted = [_KIND_NAMES.get(get_origin(kind) or kind, "nothing") for kind in kinds if kind is not type(None)]
    raise ConfigError(f"{name}={value!r}: give {' or '.join(dict.fromkeys(wanted))}")


_KIND_NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    os.PathLike: "text",
    tuple: "a list",
    Sequence: "a list",
    Mapping: "a table",
}


def _made(kind: type, value: Any, name: str) -> Any:
    return make(kind, check_names(value, kind, (), where=f"{name}."), f"{name}.")


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ConfigError for a file that is not there, too large, or not TOML."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"config file {path} is larger than {MAX_FILE_BYTES} bytes")
        return tomllib.loads(raw.decode())
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from error


def check_names(values: Any, kind: type, also_known: Collection[str], *, where: str) -> dict[str, Any]:
    """Those values that this class has a field for. Raises ConfigError for a name that neither it nor others know."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where.rstrip('.')}={values!r}: give a table of settings")
    known = names_of(kind)
    for name, value in values.items():
        for inner in value if isinstance(value, Mapping) else ():
            if f"{name}_{inner}" in known:
                raise ConfigError(
                    f"{where.rstrip('.')}: [{name}] {inner}: write {name}_{inner} = ..., outside of tables"
                )
        if name not in known and name not in also_known:
            raise unknown_name(name, [*known, *also_known], where=where)
    return {name: value for name, value in values.items() if name in known}


def unknown_name(name: str, known: Collection[str], *, where: str) -> ConfigError:
    """The error for a setting that there is not, with the nearest one that there is."""
    near = difflib.get_close_matches(name, known, 1, _NEAR)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    at = f"{where}{name}" if where.endswith(".") else f"{where}: {name!r}"
    return ConfigError(f"{at} is an unknown setting; {hint}")


# finding the types of the fields takes ten times as long as all the rest of reading settings
_hints: Callable[[type], Mapping[str, Any]] = cache(get_type_hints)


def names_of(kind: type) -> list[str]:
    return [f.name for f in fields(kind)]


# ---------------------------------------------------------------------- the environment
def _read_environment(kind: type, env: Mapping[str, str]) -> dict[str, Any]:
    """KVTIER_HOST_BYTES or KVTIER_HOST__BYTES is host_bytes; KVTIER_LIMITS__DRAIN_S is drain_s in the table limits."""
    places = _places(kind)
    found: dict[str, Any] = {}
    for variable, text in env.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower().replace("__", "_")
        if name not in places:
            _refuse_slip(variable, name, places)
            continue
        path, hint = places[name]
        value: Any = parse_text(text, hint, f"environment {variable}")
        for part in reversed(path):
            value = {part: value}
        found = _merged(found, value)
    return found


def _refuse_slip(variable: str, name: str, places: Collection[str]) -> None:
    """Variables of others are left alone, unless they are nearly one of ours: then somebody meant us."""
    near = difflib.get_close_matches(name, places, 1, _NEAR_IN_ENVIRONMENT)
    if near and name not in _OTHERS:
        raise ConfigError(
            f"environment {variable} is an unknown setting; did you mean {ENV_PREFIX}{near[0].upper()}? unset it otherwise"
        )


def _places(kind: type) -> dict[str, tuple[tuple[str, ...], Any]]:
    """By a setting's name in the environment: the tables that lead to it, and its type."""
    hints, tables = _hints(kind), _tables(kind)
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    for name in names_of(kind):
        if name in tables:
            inner = _places(tables[name])
            found |= {f"{name}_{key}": ((name, *path), hint) for key, (path, hint) in inner.items()}
        else:
            found[name] = ((name,), hints[name])
    return found


def parse_text(text: str, hint: Any, where: str) -> Any:
    """A value of the environment, by the type of its field. Raises ConfigError."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    bases = {get_origin(kind) or kind for kind in kinds}
    try:
        if bool in bases:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if float in bases:
            return float(text)
        if int in bases and str not in bases:
            return int(text)
        if str not in bases and any(isinstance(base, type) and issubclass(base, Mapping) for base in bases):
            return dict(_pair(part) for part in text.split(",") if part.strip())  # a=1GiB,b=2GiB
        if tuple in bases:
            return tuple(part.strip() for part in text.split(",") if part.strip())
    except (ValueError, KeyError):
        names = " or ".join(sorted(getattr(base, "__name__", str(base)) for base in bases if base is not type(None)))
        raise ConfigError(f"{where}={text!r} is not a {names}") from None
    return text


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(text)
    return name.strip(), value.strip()


def _tables(kind: type) -> dict[str, type]:
    """Fields that are settings classes themselves."""
    hints = _hints(kind)
    return {f.name: hints[f.name] for f in fields(kind) if is_dataclass(hints[f.name])}  # type: ignore[arg-type]


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables join, everything else is replaced."""
    out = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
        out[name] = _merged(out[name], value) if both else value
    return out


# ---------------------------------------------------------------------- writing
def to_toml(values: Mapping[str, Any], masked: Collection[str] = (), *, inside: str = "") -> str:
    """TOML of plain values; None is left out. Values of names in `masked` are replaced, wherever they stand."""
    plain, tables = [], []
    for name, value in values.items():
        if isinstance(value, Mapping):
            tables.append((name, value))
        elif value is not None:
            plain.append(f"{_key(name)} = {_value(MASK if name in masked else value)}")
    lines = plain
    for name, table in tables:
        path = f"{inside}{_key(name)}"
        shown = dict.fromkeys(table, MASK) if name in masked else table
        if table:
            lines += ["", f"[{path}]", to_toml(shown, masked, inside=f"{path}.").rstrip()]
    return "\n".join(lines).strip() + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return _text(str(value))


def _text(text: str) -> str:
    """A TOML basic string: JSON's, but that a lone DEL must be escaped and surrogate pairs must not."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
