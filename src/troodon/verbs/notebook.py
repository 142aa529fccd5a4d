"""What verbs return is what it was, and a notebook shows it as a short table."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


class Folder(type(Path())):  # pyrefly: ignore
    """The path of a folder, of which a notebook shows what is in it."""

    def _repr_html_(self) -> str | None:
        from troodon.report.glance import folder_table

        return folder_table(Path(self))


class Scores(list):
    """Scores, of which a notebook shows a table."""

    def _repr_html_(self) -> str:
        from troodon.report.glance import scores_table

        return scores_table(self)


class Summary(dict):
    """Numbers of images, of which a notebook shows the main ones."""

    def _repr_html_(self) -> str:
        from troodon.report.glance import summary_rows
        from troodon.text import html_table

        return html_table("Images", summary_rows(self))


KINDS = {type(Path()): Folder, list: Scores}


def shown(verb: Callable[P, T], kinds: dict[type, type] = KINDS) -> Callable[P, T]:
    """The same verb, whose result a notebook can show: by its type as one of `kinds`."""

    @functools.wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        result: Any = verb(*args, **kwargs)
        return cast("T", kinds[type(result)](result)) if type(result) in kinds else result

    return wrapped


def summarised(verb: Callable[P, T]) -> Callable[P, T]:
    """The same verb, whose summary a notebook can show."""
    return shown(verb, {dict: Summary})
