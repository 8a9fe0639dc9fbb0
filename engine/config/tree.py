"""Values of a config as given in files and on the command line, before they are checked against each other.

A setting has the dotted path section.name. A value of the n-th row of an array of tables has the path table.n.name,
such as phase.1.from_step; rows are numbered from 1.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.config import hints, renames
from engine.config.schema import Config, fields, tables
from engine.config.section import type_name
from engine.errors import FieldError


class ConfigTree:
    """Sections and rows of a config as nested dicts and lists, and the source of each given value by dotted path.

    errors: those found while reading. The class of a value is checked by `parse`.
    """

    def __init__(self) -> None:
        self.sections: dict[str, Any] = {name: {} for name in Config.model_fields if name not in tables()}
        self.rows: dict[str, list[dict[str, Any]]] = {table: [] for table in tables()}
        self.sources: dict[str, str] = {}
        self.errors: list[FieldError] = []

    def put(self, path: str, value: Any, source: str) -> None:
        """Set one value. A row after the last one is added; a higher number is an error."""
        if path in {f"{section}.{name}" for section, name, _ in fields()}:
            section, name = path.split(".")
            self.sections[section][name] = value
        elif (parts := split_row_path(path)) and parts[2] in tables()[parts[0]].model_fields:
            table, number, name = parts
            rows = self.rows[table]
            if not 1 <= number <= len(rows) + 1:
                before = f"there {'is 1 row' if len(rows) == 1 else f'are {len(rows)} rows'} of {table} ({source})"
                self.errors.append(
                    FieldError("config.row-out-of-order", path, value, before, f"The next is {table}.{len(rows) + 1}.")
                )
                return
            rows += [{}] * (number > len(rows))
            rows[number - 1] = {**rows[number - 1], name: value}
        else:
            self.errors.append(unknown_setting(path, value, source))
            return
        self.sources[path] = source

    def read_file(self, file: Path) -> None:
        """Set all values of a TOML file; its rows of a table replace those of earlier files."""
        source = f"file {file}"
        for section, values in self._read_toml(file).items():
            if section in tables():
                self._put_rows(section, values, source)
            elif not isinstance(values, dict):
                self.errors.append(unknown_setting(section, values, source))
            else:
                for name, value in values.items():
                    path = f"{section}.{name}"
                    (self._put_rows if path in tables() else self.put)(path, value, source)

    def parse(self) -> tuple[Config, set[str]]:
        """(config, paths of invalid values): invalid values get their defaults, so that the others can be checked.

        If a value of a row is invalid, the config has no row of its table, and the paths include `table.`.
        """
        tree: dict[str, Any] = {section: dict(values) for section, values in self.sections.items()}
        for table, rows in self.rows.items():
            section, _, name = table.partition(".")
            (tree[section] if name else tree)[name or section] = [dict(row) for row in rows]
        try:
            return Config.model_validate(tree), set()
        except ValidationError as error:
            by_path = {f"{s}.{n}": f for s, n, f in fields()}
            wrong = set()
            for item in error.errors():
                path = _path_of(item["loc"])
                problem = item["msg"][0].lower() + item["msg"][1:]
                if row := split_row_path(path):
                    table, _, name = row
                    section, _, inner = table.partition(".")
                    (tree[section] if inner else tree)[inner or section] = []
                    fix = f"Give {type_name(tables()[table].model_fields[name].annotation)}, or leave it out."
                    wrong.add(f"{table}.")
                else:
                    section, name = path.split(".")
                    tree[section].pop(name, None)
                    fix = f"Give {type_name(by_path[path].annotation)}; the default is {by_path[path].default!r}."
                    wrong.add(path)
                self.errors.append(FieldError("config.value-not-valid", path, item["input"], problem, fix))
            return Config.model_validate(tree), wrong

    def _put_rows(self, table: str, values: object, source: str) -> None:
        if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
            problem = f"is not an array of tables ({source})"
            self.errors.append(
                FieldError("config.not-tables", table, values, problem, f"Write [[{table}]] above the values of each.")
            )
            return
        self.rows[table] = []
        self.sources = {path: given for path, given in self.sources.items() if not path.startswith(f"{table}.")}
        for number, row in enumerate(values, 1):
            self.rows[table].append({})
            for name, value in row.items():
                self.put(f"{table}.{number}.{name}", value, source)

    def _read_toml(self, file: Path) -> dict[str, Any]:
        try:
            tree = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            problem, fix = f"cannot be read ({error})", "Give the path of a TOML file."
            self.errors.append(FieldError("config.file-not-readable", "--config", str(file), problem, fix))
            return {}
        except tomllib.TOMLDecodeError as error:
            problem = f"is not valid TOML: {error}"
            self.errors.append(FieldError("config.file-not-toml", "--config", str(file), problem, "Fix that line."))
            return {}
        return renames.to_current_names(tree) if renames.is_run_folder_config(file) else tree


def split_row_path(path: str) -> tuple[str, int, str] | None:
    """(table, row number, name) of the path of a row's value; None for any other path."""
    for table in tables():
        if path.startswith(f"{table}."):
            place, _, name = path.removeprefix(f"{table}.").partition(".")
            return (table, int(place), name) if place.isdecimal() and name else None
    return None


def value_at(config: Config, path: str) -> Any:
    """The value of a setting, or of a row's value, by its dotted path."""
    if row := split_row_path(path):
        table, number, name = row
        return getattr(rows_of(config, table)[number - 1], name)
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def rows_of(config: Config, table: str) -> tuple[Any, ...]:
    """The rows of an array of tables, by its path."""
    found: Any = config
    for name in table.split("."):
        found = getattr(found, name)
    return tuple(found)


def unknown_setting(path: str, value: object, source: str) -> FieldError:
    """The error of a path that is no setting, with the one that is probably intended."""
    path = path.replace("-", "_")
    if new := renames.SETTINGS.get(path):
        return FieldError("config.renamed", path, value, f"was renamed ({source})", f"Use {new}.")
    problem, fix = f"no such setting ({source})", "`engine train --help` lists all settings."
    if table := _table_of(path):
        known = list(tables()[table].model_fields)
        place, _, name = path.removeprefix(table).strip(".").rpartition(".")
        near = hints.nearest(name, known)
        near = name if name in known else near
        place = place if place.isdecimal() else "1"
        fix = f"Did you mean {table}.{place}.{near}?" if near else f"A row of {table} has {', '.join(known)}."
    elif near := hints.nearest(path, tables()):
        fix = f"Did you mean [[{near}]]?"
    elif hint := hints.suggest(path, [f"{s}.{n}" for s, n, _ in fields()]):
        problem += f"; an option of {hint.engine}" if hint.engine else ""
        problem += f": {hint.remark}" if hint.remark else ""
        fix = f"Did you mean {hint.ours}?" if hint.ours else "It has no counterpart here; see docs/coming_from.md."
    return FieldError("config.unknown-setting", path, value, problem, fix)


def _table_of(path: str) -> str:
    """The array of tables that a path begins with; empty if it begins with none."""
    return next((table for table in tables() if path == table or path.startswith(f"{table}.")), "")


def _path_of(place: Iterable[int | str]) -> str:
    """Dotted path of the place of a pydantic error, rows numbered from 1, without what is inside of a value."""
    path = ""
    for part in place:
        path = ".".join(filter(None, (path, str(part + 1 if isinstance(part, int) else part))))
        row = split_row_path(path)
        if row or (_table_of(path) == "" and path.count(".") == 1):
            break
    return path


def given_rows(tree: ConfigTree) -> Iterator[str]:
    """Paths of all given values of rows, in the order of tables, rows and fields."""
    for table, rows in tree.rows.items():
        for number, row in enumerate(rows, 1):
            yield from (f"{table}.{number}.{name}" for name in tables()[table].model_fields if name in row)
