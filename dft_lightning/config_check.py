"""Configuration files that cannot be read, or that give a key twice, are refused with their name and line."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from dft_lightning.errors import UserError
from dft_lightning.option_sources import options
from dft_lightning.suggestions import did_you_mean


def refuse_unreadable(words: Sequence[str]) -> None:
    """Check the configuration files that the words name.

    Raises:
        UserError: a file is missing, is not YAML, is not a mapping of options, or has the same key twice.
    """
    for name, value in options(words):
        if name in ("config", "c") and value not in ("", "-") and "://" not in value:
            _check(value)


def _check(value: str) -> None:
    path = Path(value)
    is_file = len(value) < 4096 and "\n" not in value and path.exists()
    try:
        root = yaml.compose(path.read_text(encoding="utf-8") if is_file else value, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"--config {value}{line}: not YAML: {error.problem}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {value} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(root, yaml.MappingNode):
        _refuse_repeated(root, value if is_file else "--config")
        return
    if not is_file:
        beside = [str(each) for each in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"--config {value}: there is no such file{did_you_mean(value, beside)}")
    kind = "empty" if root is None else "a list" if isinstance(root, yaml.SequenceNode) else "one value"
    raise UserError(f"--config {value} is {kind}; expected options, such as model: with its own below it")


def _refuse_repeated(node: yaml.Node, place: str) -> None:
    """YAML would take the last of several, and drop what the others say."""
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _refuse_repeated(each, place)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.value != "<<" and lines.setdefault(key.value, line) != line:
            first = lines[key.value]
            raise UserError(f"{place}, line {line}: {key.value} is given in line {first}, too; keep one of them")
        _refuse_repeated(value, place)
