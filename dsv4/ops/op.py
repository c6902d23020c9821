"""One meaning, many machines: ops, their faster implementations, and who chooses between them.

`@op` makes a plain function the reference of an op: its body is its meaning, and what a bare call runs, wherever its
tensors are. Kernels register faster versions from their own room; they run only inside `use`, so that nothing changes
under code that did not ask for it. What is said there holds for the thread (or task) that said it.

Choices, for one op by its name or for all others by "*":

    reference   the body; and by name, whatever else was said, the bodies of all ops that it calls
    unfused     the body, while the ops that it calls choose for themselves
    auto        on a GPU the first implementation that the architecture prefers and that accepts the arguments, an error
                where there is none; on a CPU the reference
    covered     auto for an op for which the architecture has implementations, the body for any other
                (and "*": "unfused" is unfused for the ops that it prefers so, and this for all others)
    NAME        that implementation, or an error that says why it cannot run

The tensor that an op is given first says where it runs. A choice follows from shapes, dtypes and the device alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from threading import Lock
from typing import Any, Final, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from dsv4.errors import KernelError
from dsv4.quant.tensor import QTensor

P = ParamSpec("P")
R = TypeVar("R")

Choices = Mapping[str, str]  # op, or "*" for all that are not named -> choice
Preference = Callable[[torch.device], Mapping[str, Sequence[str]]]  # op -> implementations, the best first

PURE: Final[Choices] = {"*": "reference"}
EVERYWHERE: Final = ("reference", "unfused", "auto", "covered")  # what "*" may stand for
OPS: dict[str, Op[..., Any]] = {}

Listener = Callable[["Op[..., Any]", str, tuple[Any, ...], Any], None]  # op, what ran, its arguments, its result

_said: ContextVar[Choices | None] = ContextVar("choices", default=None)
_deciding = 0  # open blocks, of all threads, that ask for more than references or watch; while it is 0 no call looks
_counting = Lock()
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


class Implementation(NamedTuple):
    """One way to run an op. `accepts`: None, or why it cannot take these arguments."""

    accepts: Callable[..., str | None]
    run: Callable[..., Any]


class Explained(NamedTuple):
    """What a call comes to: the implementation that runs (None: an error), and why each other one does not."""

    op: str
    runs: str | None
    others: Mapping[str, str]


class Op(Generic[P, R]):
    """A reference, its implementations by name, and how often each of them ran.

    Counts of threads that run at once may miss each other; a count of zero is a fact.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        # One by one: after functools.update_wrapper, which writes into __dict__, every access is slower.
        self.__module__, self.__doc__, self.__wrapped__ = reference.__module__, reference.__doc__, reference
        self.name = self.__name__ = reference.__name__
        self.reference = reference
        self.implementations = {
            "reference": Implementation(_anything, _purely(reference)),
            "unfused": Implementation(_anything, reference),
        }
        self._references, self._others = 0, Counter[str]()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        choices = _said.get() if _deciding else None  # the way of every call on a CPU: two tests and one count
        if choices is None or choices is PURE:
            self._references += 1
            return self.reference(*args, **kwargs)
        name, run = self._pick(choices, args, kwargs)
        self._others[name] += 1
        listener = _listener.get()
        return run(*args, **kwargs) if listener is None else self._told(listener, name, run, args, kwargs)

    def _told(self, listener: Listener, name: str, run: Callable[..., R], args: Any, kwargs: Any) -> R:
        token = _listener.set(None)  # the ops that this one calls are its own affair
        try:
            result = run(*args, **kwargs)
        finally:
            _listener.reset(token)
        listener(self, name, args, result)
        return result

    @property
    def calls(self) -> Counter[str]:
        """Calls so far by implementation."""
        return self._others + Counter(reference=self._references)

    def forget_calls(self) -> None:
        """Set the counts to zero."""
        self._references, self._others = 0, Counter()

    def impl(self, name: str, accepts: Callable[P, str | None]) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register a function of the same signature under `name`."""
        assert name not in self.implementations, f"{self.name} has an implementation {name}"

        def register(run: Callable[P, R]) -> Callable[P, R]:
            self.implementations[name] = Implementation(accepts, run)
            return run

        return register

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Explained:
        """What this call would come to here, under the present choices; nothing is run."""
        runs, _, refused = self._decide(_said.get() or PURE, args, kwargs)
        rest = [name for name in self.implementations if name not in refused and name != runs]
        return Explained(self.name, runs, refused | dict.fromkeys(rest, "not the choice"))

    def _pick(self, choices: Choices, args: Any, kwargs: Any) -> tuple[str, Callable[..., R]]:
        name, run, refused = self._decide(choices, args, kwargs)
        if name is not None:
            return name, run
        why = ", ".join(f"{name}: {reason}" for name, reason in refused.items()) or "this architecture has no kernel"
        raise KernelError(
            f"{self.name} cannot run as chosen ({why})",
            got=_shown((*args, *kwargs.values())),
            do=f"allow its reference by name: {self.name}=reference",
        )

    def _decide(self, choices: Choices, args: Any, kwargs: Any) -> tuple[str | None, Callable[..., R], dict[str, str]]:
        """Name and function of what runs (no name: nothing can), and why each one tried before it does not."""
        tries, body = self._tries(choices, _device(args, kwargs))
        refused: dict[str, str] = {}
        for name in tries:
            found = self.implementations.get(name)
            reason = "not installed" if found is None else found.accepts(*args, **kwargs)
            if found is not None and reason is None:
                return name, found.run, refused
            refused[name] = reason or ""
        return "reference" if body else None, self.reference, refused

    def _tries(self, choices: Choices, device: torch.device) -> tuple[Sequence[str], bool]:
        """The implementations to try, and whether the body runs if there is none to try."""
        named = choices.get(self.name)
        choice = named or choices.get("*", "reference")
        order = self._order(device) if choice in EVERYWHERE else ()
        if named is None and choice == "unfused":
            choice = "unfused" if "unfused" in order else "covered"
        if named is None and choice == "reference":
            return (), True  # an op that it calls may have been named
        if choice not in ("auto", "covered"):
            return (choice,), False
        return order, not order and (choice == "covered" or device.type != "cuda")

    def _order(self, device: torch.device) -> Sequence[str]:
        return _preference(device).get(self.name, ()) if device.type == "cuda" else ()


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Make a function the reference of an op of its name."""
    assert reference.__name__ not in OPS, f"two ops {reference.__name__}"
    made = Op(reference)
    OPS[made.name] = made
    return made


@contextmanager
def use(everywhere: str | Choices | None = None, /, **named: str) -> Iterator[None]:
    """Inside the block, choose: `use("auto")`, `use(rms_norm="reference")`, `use({"*": "auto"}, mhc_pre="unfused")`.

    What is named overrides what was said further out; "*" forgets it. KernelError for names that do not exist.
    """
    asked = {"*": everywhere} if isinstance(everywhere, str) else dict(everywhere or {})
    asked |= named
    check_choices(asked)
    with _saying(_over(asked, _said.get())):
        yield


def pure() -> AbstractContextManager[None]:
    """Inside the block, references alone."""
    return _saying(PURE)


@contextmanager
def watching(listener: Listener) -> Iterator[None]:
    """Inside the block, tell `listener` of every op that no other op called. Choices stay as they are."""
    token = _listener.set(listener)
    try:
        with _deciding_by(dict(_said.get() or PURE)):  # a copy: the short way, which tells nobody, is for PURE itself
            yield
    finally:
        _listener.reset(token)


def under(choices: Choices) -> AbstractContextManager[None]:
    """Inside the block, `choices` (which `check_choices` has seen) hold where nothing was said further out."""
    said = _said.get()
    return _saying(choices if said is None else _over(said, choices))


def check_choices(choices: Choices) -> None:
    """KernelError for an op, or an implementation, that does not exist."""
    for name, choice in choices.items():
        if name == "*":
            known: Sequence[str] = EVERYWHERE
        elif name in all_ops():
            known = ("auto", "covered", *OPS[name].implementations)
        else:
            near = get_close_matches(name, OPS, n=1)
            raise KernelError("there is no such op", got=name, wanted=" or ".join((*(near or sorted(OPS)), "*")))
        if choice not in known:
            raise KernelError(f"there is no such choice for {name}", got=choice, wanted=" or ".join(known))


def all_ops() -> Mapping[str, Op[..., Any]]:
    """Every op by its name, from all files of this room."""
    from dsv4.ops import (  # noqa: F401
        attention,
        compress,
        experts,
        index,
        index_logits,
        index_queries,
        kv,
        linear,
        linear_grouped,
        linear_heads,
        mhc,
        moe,
        norm,
        quantize,
        rope,
        sample,
    )

    return OPS


def counts() -> dict[str, dict[str, int]]:
    """How often each implementation of each op ran since `forget_counts`; ops that never ran are left out."""
    return {name: dict(one.calls) for name, one in OPS.items() if one.calls}


def forget_counts() -> None:
    """Set the counts of every op to zero."""
    for one in OPS.values():
        one.forget_calls()


def prefer(preference: Preference) -> None:
    """Where kernels say what each architecture prefers; `dsv4.kernels.install` calls this."""
    global _preference
    _preference = preference


def _nothing(device: torch.device) -> Mapping[str, Sequence[str]]:
    return {}


_preference: Preference = _nothing


def _anything(*args: object, **kwargs: object) -> None:
    return None


def _purely(reference: Callable[P, R]) -> Callable[P, R]:
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _saying(PURE):
            return reference(*args, **kwargs)

    return run


def _saying(choices: Choices) -> AbstractContextManager[None]:
    return _deciding_by(PURE if choices == PURE else choices)


@contextmanager
def _deciding_by(choices: Choices) -> Iterator[None]:
    global _deciding
    deciding = choices is not PURE
    token = _said.set(choices)
    with _counting:
        _deciding += deciding
    try:
        yield
    finally:
        with _counting:
            _deciding -= deciding
        _said.reset(token)


def _over(inner: Choices, outer: Choices | None) -> Choices:
    return inner if outer is None or "*" in inner else {**outer, **inner}


def _device(args: Any, kwargs: Any) -> torch.device:
    if args and isinstance(args[0], Tensor | QTensor):
        return args[0].device
    return next(x.device for x in kwargs.values() if isinstance(x, Tensor))


def _shown(given: object) -> str:
    """Tensors by dtype and shape, the rest as it is."""
    if isinstance(given, Tensor):
        return f"{str(given.dtype).removeprefix('torch.')}{list(given.shape)} on {given.device}"
    if isinstance(given, tuple):
        return ", ".join(map(_shown, given))
    return getattr(given, "name", None) or repr(given)
