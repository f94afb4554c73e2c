"""From a frozen dataclass to command-line flags, and from a user's mistake to one line.

Each entry point has one config dataclass. Its fields are its flags, its YAML keys (`--config file.yaml`) and what is
saved with the result; nothing is said twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from runtime.files import REQUIRED, Field

Config = TypeVar("Config")
PRESETS = Path(__file__).resolve().parent.parent / "configs"


def flag(
    default: Any,
    help: str,
    *,
    group: str = "general",
    aliases: tuple[str, ...] = (),
    choices: Sequence | None = None,
    metavar: str | None = None,
    positional: bool = False,
    bare: str | None = None,
    on_resume: str = "fixed",
    record: Field | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        default: value when neither the command line nor the config file says otherwise; `REQUIRED` if one must;
            `None` where the program decides, which `help` should then explain.
        help: one sentence, with units.
        group: heading under which `--help` lists the flag.
        aliases: other spellings, such as "--proj-coeff".
        choices: the allowed values.
        bare: value of the flag without one, where it once was a switch.
        positional: it may also be given without its name, before all flags: `program a b --other 1`.
        on_resume: whether the setting may be changed on resume: "fixed", "announced" or "free".
        record: how records that lack the field, or have it in an older form, are read; by default they have `default`.
    """
    metadata = {"help": help, "group": group, "aliases": aliases, "choices": choices, "metavar": metavar}
    metadata |= {"positional": positional, "bare": bare, "on_resume": on_resume, "record": record}
    return dataclasses.field(default=default, metadata=metadata)


def check(config: Any, name: str, holds: bool, expected: str) -> None:
    """Refuse a setting that does not hold what it must.

    Raises:
        ValueError: it does not; names the flag, what was expected and what came.
    """
    if not holds:
        found = getattr(config, name)
        found = " ".join(map(str, found)) if isinstance(found, tuple) else found
        raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, found {found}")


def is_positive(text: str) -> bool:
    """Whether it is a finite number above 0."""
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


class _Parser(argparse.ArgumentParser):
    source = ""  # named in errors: where the values that are being read come from
    seen: dict[str, tuple]  # of each setting, the spelling that gave it last and the value

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {self.source}{message}\n")


class _Store(argparse.Action):
    """Keeps a value; two spellings of one flag with different values are an error (of one spelling the later wins)."""

    def __call__(self, parser, arguments, values, option_string=None):
        spelling, before = parser.seen.get(self.dest, (option_string, values))
        if spelling != option_string and before != values:
            parser.error(f"{option_string}: expected {_shown(before)}, as {spelling} says, found {_shown(values)}")
        parser.seen[self.dest] = option_string, values
        setattr(arguments, self.dest, values)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


def parse(config_class: type[Config], argv: Sequence[str] | None = None, description: str = "") -> Config:
    """Build `config_class` from defaults, a `--preset`, `--config file.yaml`, the command line; the later wins.

    Exits with code 2 and one line on an unknown flag or key, a value of the wrong type, or a missing required flag.
    """
    return parse_given(config_class, argv, description)[0]


def parse_given(
    config_class: type[Config], argv: Sequence[str] | None = None, description: str = ""
) -> tuple[Config, frozenset[str]]:
    """As `parse`; and the names of the flags that the user gave, by preset, in the config file or on the command line.

    If the class has `other_flags`, another dataclass of flags, these are no settings of their own:
    `other_flags.meaning(those given, all that was given)` says which settings they mean.
    """
    other = getattr(config_class, "other_flags", None)
    settings = {field.name: field for field in dataclasses.fields(config_class)}
    fields = ({field.name: field for field in dataclasses.fields(other)} if other else {}) | settings
    positional = next((field for field in fields.values() if field.metadata["positional"]), None)
    usage = positional.name.upper() + " " if positional else ""
    parser = _Parser(
        usage=f"%(prog)s {usage}[flags]",
        description=description.partition("\n")[0],
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", metavar="YAML", help="file that sets any of the flags below (key: value)")
    hints = (typing.get_type_hints(other) if other else {}) | typing.get_type_hints(config_class)
    groups = {}
    for name, field in (settings | fields).items():
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(*_spellings(field), **_argument(field, hints[name]))
        if field.metadata["bare"]:
            off = {"action": "store_const", "const": field.default, "default": argparse.SUPPRESS}
            groups[title].add_argument("--no-" + _spellings(field)[0][2:], dest=name, help=argparse.SUPPRESS, **off)

    argv = list(sys.argv[1:] if argv is None else argv)
    if positional and argv and not argv[0].startswith("-"):
        argv.insert(0, _spellings(positional)[0])
    # What was given, by source; the later wins.
    layers = [("", _parse(parser, fields, argv))]
    config_file = layers[0][1].pop("config")
    if config_file:
        layers.insert(0, _read_yaml(parser, f"--config {config_file}: ", config_file, fields, hints))
    preset = dict(item for _, layer in layers for item in layer.items()).get("preset")
    if preset:
        layers.insert(0, _read_yaml(parser, f"--preset {preset}: ", _preset_file(parser, preset), fields, hints))
    given = dict(item for _, layer in layers for item in layer.items())
    # What a preset alone says is no wish to change a run that is resumed.
    kept = {name for name in layers[0][1] if preset and fields[name].metadata["on_resume"] != "fixed"}
    kept -= {name for _, layer in layers[1:] for name in layer}
    values = {name: field.default for name, field in settings.items()}
    names = set(given)
    for parser.source, layer in layers:
        found = _translated(parser, layer, given, settings, other)
        values |= found
        names |= found.keys()
    missing = [_spellings(fields[name])[0] for name, value in values.items() if value is REQUIRED]
    if missing:
        parser.error(f"missing {', '.join(missing)} (see --help)")
    for name, value in values.items():
        values[name] = tuple(map(_at_home, value)) if isinstance(value, (list, tuple)) else _at_home(value)
    return config_class(**values), frozenset(names - kept)


def _translated(parser: _Parser, layer: dict, given: dict, settings: dict, other: type | None) -> dict[str, Any]:
    """One source's settings, with those that its flags of `other` mean."""
    own = {name: value for name, value in layer.items() if name in settings}
    try:
        flags = {name: value for name, value in layer.items() if name not in settings}
        meant = other.meaning(flags, given) if flags else {}
    except ValueError as error:
        parser.error(str(error))
    for name, (flag, value) in meant.items():
        means = f"--{flag} means --{name}".replace("_", "-")
        if name not in settings:
            parser.error(f"{means}, which does not exist")
        if own.setdefault(name, value) != value:
            parser.error(f"{means} {_shown(value)}, found {_shown(own[name])} beside it; leave one of them out")
    return own


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _at_home(value: Any) -> Any:
    """`~` and `~/x` are the home directory, from a YAML file or a script too, where no shell makes them so."""
    return os.path.expanduser(value) if isinstance(value, str) and value.partition("/")[0] == "~" else value


def _parse(parser: _Parser, fields: dict[str, dataclasses.Field], argv: Sequence[str] | None) -> dict[str, Any]:
    """What `argv` says, by field name."""
    parser.seen = {}
    arguments, unknown = parser.parse_known_args(argv)
    positional = next((field for field in fields.values() if field.metadata["positional"]), None)
    if (
        positional
        and unknown
        and positional.name not in arguments
        and not any(word.startswith("-") for word in unknown)
    ):
        return vars(parser.parse_args([_spellings(positional)[0], *unknown], arguments))  # behind the flags
    if unknown:
        known = [spelling for field in fields.values() for spelling in _spellings(field)]
        parser.error(_unknown("flag", unknown[0], known))
    return vars(arguments)


def _spellings(field: dataclasses.Field) -> list[str]:
    return ["--" + field.name.replace("_", "-"), *field.metadata["aliases"]]


def _argument(field: dataclasses.Field, hint: Any) -> dict:
    """Keyword arguments of `add_argument` for a field annotated `hint`."""
    help_text = field.metadata["help"].replace("%", "%%")
    if field.default is not REQUIRED and field.default not in (None, (), ""):
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        help_text += f" (default: {shown})"
    common = {"help": help_text, "default": argparse.SUPPRESS, "dest": field.name}
    if _is_bool(hint):
        return common | {"action": argparse.BooleanOptionalAction}
    hint = _without_none(hint)
    common |= {"choices": field.metadata["choices"], "metavar": field.metadata["metavar"], "action": _Store}
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        return common | {"type": inner[0], "nargs": "+" if inner[-1] is Ellipsis else len(inner)}
    bare = field.metadata["bare"]
    return common | {"type": hint} | ({"nargs": "?", "const": bare} if bare else {})


def _without_none(hint: Any) -> Any:
    """X for `X | None`, else the hint itself."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    return hint


def _is_bool(hint: Any) -> bool:
    return _without_none(hint) is bool


def _unknown(kind: str, found: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(found.split("=")[0], list(known), n=1)
    return f"unknown {kind} {found}" + (f"; did you mean {close[0]}?" if close else " (see --help)")


def _preset_file(parser: _Parser, name: str) -> str:
    """The file of a preset in `configs/`, by its name."""
    known = {file.stem: str(file) for file in PRESETS.glob("*.yaml")}
    if name not in known:
        parser.error(f"--preset: expected one of {', '.join(sorted(known))}, found {name}")
    return known[name]


def _read_yaml(parser: _Parser, source: str, path: str, fields: dict, hints: dict) -> tuple[str, dict[str, Any]]:
    """What a file says, by field name; and how errors name it."""
    parser.source = source
    found = _parse(parser, fields, _yaml_to_flags(parser, path, fields, hints))
    del found["config"]
    return source, found


def _yaml_to_flags(parser: _Parser, path: str, fields: dict[str, dataclasses.Field], hints: dict) -> list[str]:
    """The file's lines as flags, so that a value is checked the same way wherever it comes from."""
    import yaml

    try:
        content = yaml.BaseLoader(Path(path).read_text()).get_single_data()  # scalars stay the text that stands there
    except OSError as error:
        parser.error(error.strerror)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"not YAML: {' '.join(str(error).split())}")
    content = content or {}
    if not isinstance(content, dict):
        parser.error(f"expected lines of `key: value`, found a {type(content).__name__}")
    names = {spelling.lstrip("-"): name for name, field in fields.items() for spelling in _spellings(field)}
    flags = []
    for key, value in content.items():
        name = names.get(str(key).replace("_", "-"))
        if name is None:
            parser.error(_unknown("key", str(key), names))
        spelling = "--" + str(key).replace("_", "-")
        if value in ("", "null"):
            continue  # `key:` with nothing behind it keeps the default
        if _is_bool(hints[name]) or (fields[name].metadata["bare"] and value in ("true", "false")):
            if str(value).lower() not in ("true", "false"):
                parser.error(f"{key}: expected true or false, found {value!r}")
            flags.append(spelling if value.lower() == "true" else "--no-" + spelling[2:])
        elif isinstance(value, list):
            flags += [spelling, *map(str, value)]
        else:
            flags.append(f"{spelling}={value}")
    return flags


def parse_early(config_class: type, description: str) -> None:
    """Answer `--help` and refuse wrong flags, before an entry point imports what is slow (torch)."""
    run(lambda: parse(config_class, None, description))


def run(main: Callable[[], None]) -> None:
    """Call an entry point's `main`; a `ValueError` raised by a line of this project becomes one line and exit code 2.

    A ValueError that a library raised is a defect of ours and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8
    try:
        main()
    except Exception as error:
        if isinstance(error, ValueError) and _raised_by_project(error):
            rank = os.environ.get("RANK", "0")
            print(f"error: {error}" if rank == "0" else f"error [rank {rank}]: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        # Raised on, Python would keep the error's frames, and with them the DataLoader workers, until it has waited for
        # these: for ever, since training's ignore the signal that ends them.
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _raised_by_project(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    source = Path(trace.tb_frame.f_code.co_filename).resolve()
    root = Path(__file__).resolve().parent.parent
    return source.is_relative_to(root) and not {".venv", "site-packages"} & set(source.relative_to(root).parts)
