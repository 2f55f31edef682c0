"""torch.compile as a peer."""

from __future__ import annotations

from collections.abc import Callable

from ..contests.contest import Contest
from ..contests.setting import Setting

COMPILED = "torch.compile"


def enter(contest: Contest, setting: Setting, make: Callable[[], Callable[[], object]]) -> None:
    """``make`` compiles and returns the call. A quick run leaves it out, for it takes longer than all the rest."""
    if setting.quick:
        contest.lacks(COMPILED, "a quick run does not compile")
        return
    try:
        call = make()
        call()
    except Exception as error:  # no compiler, or one that cannot do this
        contest.lacks(COMPILED, f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]:.200}")
    else:
        contest.enter(COMPILED, call)
