"""Settings: presets in TOML, the command line over them, and the record of what was used.

A TOML file has a table per program (`[train_control]`, `[nano.autoencoder]`), whose keys are the
program's options (`[train_control.loop]` holds `--loop.*`), and may have a table `[common]` that
is merged under each. `base = "nano"` before all tables starts from those of another preset.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import (
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import tomli_w
import tomllib
import tyro

from tools.ending import sentence

ConfigT = TypeVar("ConfigT")

PRESETS = Path(__file__).parent / "configs"
# `[common]` may hold these though a program lacks them.
_SHARED = frozenset({"loop", "data", "model"})
LENGTHS = ("steps", "epochs", "minutes")
"""Options of a training's length, of which it has one; where one is given, a preset's others go."""


def parse(
    kind: type[ConfigT], description: str | None = None, args: Sequence[str] | None = None
) -> ConfigT:
    """Read the settings of a program, whose config dataclass is defined in its module, from the
    command line, over a preset if `--config` names one.

    Raises ValueError where the preset does not exist, or holds what `kind` does not know.
    """
    front = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    front.add_argument("--config")
    known, rest = front.parse_known_args(sys.argv[1:] if args is None else list(args))
    default: Any = tyro.MISSING
    if known.config:
        lengths = [n for n in LENGTHS if any(a.split("=")[0] == f"--loop.{n}" for a in rest)]
        given = {"loop": dict.fromkeys(lengths, 0)} if lengths else {}
        values = _merged(_table(kind, known.config), given)
        default = _build(kind, values, f"{known.config}: [{table_name(kind)}]", complete=False)
    text = (
        f"{description or kind.__doc__ or ''}\n\n--config {'|'.join(_preset_names())}|FILE.toml "
        f"starts from a preset's table [{table_name(kind)}]; options given here win. With it, "
        "--help shows the preset's values."
    )
    if default is tyro.MISSING:
        return tyro.cli(kind, description=text, args=rest)
    return tyro.cli(kind, description=text, args=rest, default=default)


def run_program(
    main: Callable[[ConfigT], object], kind: type[ConfigT], description: str | None
) -> NoReturn:
    """Run a program on the settings of its command line or a preset, and end the process."""
    exit_after(lambda: main(parse(kind, description)))


def exit_after(program: Callable[[], object]) -> NoReturn:
    """Run a program and end the process, see `tools.ending.sentence`, which decides between one
    line and a traceback."""
    try:
        program()
    except Exception as error:
        words = sentence(error)
        if words is None:
            raise
        sys.exit(f"error: {words}")
    sys.exit()


def load(kind: type[ConfigT], preset: str | Path, overrides: Mapping[str, Any]) -> ConfigT:
    """Settings of a program from a preset, with nested `overrides` over it. Raises ValueError as
    `parse`, or where an option without a default is given by neither."""
    values = _merged(_table(kind, str(preset)), overrides)
    return _build(kind, values, f"{preset}: [{table_name(kind)}]", complete=True)


def table_name(kind: type[Any]) -> str:
    """The program's name below `training`, such as `train_control` or `nano.vision`."""
    name = kind.__module__
    if name == "__main__" and (spec := sys.modules["__main__"].__spec__) is not None:
        name = spec.name
    return name.removeprefix(f"{__package__}.").removesuffix(".__main__")


def settings(config: Any) -> dict[str, Any]:
    """A config dataclass as nested tables that TOML and JSON can hold; None is left out."""
    return _without_none(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in table.items() if value is not None}
    return {n: _without_none(v) if isinstance(v, dict) else v for n, v in given.items()}


def write(config: Any, path: Path) -> None:
    """Write a config as a file for `--config`."""
    tables: dict[str, Any] = settings(config)
    for name in reversed(table_name(type(config)).split(".")):
        tables = {name: tables}
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")


def _preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def _table(kind: type[Any], preset: str) -> dict[str, Any]:
    """The preset's table for `kind`, with `[common]` merged under it."""
    tables = _tables(preset)
    common = tables.pop("common", {})
    for name in tables:
        if not _is_program(name):
            raise ValueError(
                f"{preset}: table [{name}] belongs to no program of {__package__}; a table is "
                "named as its program is, or [common]"
            )
    own: Any = tables
    for part in table_name(kind).split("."):
        own = own.get(part, {})
    programs = [key for key in own if _is_program(f"{table_name(kind)}.{key}")]
    own = {key: value for key, value in own.items() if key not in programs}
    fields = {field.name for field in dataclasses.fields(kind)}
    shared = {k: v for k, v in common.items() if k in fields or k not in _SHARED}
    _reject_unknown(kind, shared, f"{preset}: [common]")
    return _merged(shared, own)


def _tables(preset: str) -> dict[str, Any]:
    """All tables of a preset, over those of the one that it names as its `base`."""
    path = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"--config {preset}: no such preset or file; give {', '.join(_preset_names())} "
            "or a path that ends in .toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {preset}: {path} is not TOML: {error}") from error
    base = tables.pop("base", None)
    return tables if base is None else _merged(_tables(base), tables)


def _is_program(name: str) -> bool:
    path = Path(__file__).parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    taken = not above.keys().isdisjoint(LENGTHS)
    merged = {name: value for name, value in below.items() if not (taken and name in LENGTHS)}
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _reject_unknown(kind: type[Any], values: Mapping[str, Any], where: str) -> None:
    accepted = [field.name for field in dataclasses.fields(kind)]
    if unknown := [name for name in values if name not in accepted]:
        raise ValueError(f"{where} has no option {unknown[0]!r}; accepted: {', '.join(accepted)}")


def _build(
    kind: type[Any], values: Mapping[str, Any], where: str, *, complete: bool, base: Any = None
) -> Any:
    """An instance of `kind` with `values` over its defaults, or over `base`.

    Where it need not be `complete`, options without a default are left for tyro to ask for; the
    instance's own checks then wait until tyro makes the final one.
    """
    _reject_unknown(kind, values, where)
    hints = get_type_hints(kind)
    made: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], field.name
        default = getattr(base, name) if base is not None else _default(field)
        table = next(filter(dataclasses.is_dataclass, (hint, *get_args(hint))), None)
        values_below = values.get(name, {} if default is tyro.MISSING else None)
        if table is not None and isinstance(values_below, Mapping):
            inner = None if default is tyro.MISSING else default
            place = f"{where.removesuffix(']')}.{name}]"
            default = _build(cast(Any, table), values_below, place, complete=complete, base=inner)
        elif name in values:
            default = _converted(hint, values[name], f"{where} {name}")
        if default is tyro.MISSING and complete:
            raise ValueError(f"{where} needs {field.name!r}, which has no default")
        made[field.name] = default
    if complete:
        return kind(**made)
    instance = object.__new__(kind)
    for name, value in made.items():
        object.__setattr__(instance, name, value)
    return instance


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING


def _converted(hint: Any, value: Any, where: str) -> Any:
    """`value` of TOML or Python as a field's type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for choice in inner:
            with contextlib.suppress(ValueError):
                return _converted(choice, value, where)
    elif origin is Literal:
        if value in inner:
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        if len(inner) == 2 and inner[1] is ...:
            return tuple(_converted(inner[0], item, where) for item in value)
        if len(inner) == len(value):
            return tuple(_converted(h, v, where) for h, v in zip(inner, value, strict=True))
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    accepted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"{where}: found {value!r}, give {accepted}")
