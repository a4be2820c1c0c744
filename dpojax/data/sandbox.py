"""Where chat templates run: `transformers`' own environment with a clock that stands still, and limits.

A template is a program that came with a tokenizer. It may loop for ever, or ask for more memory than
there is; here its loops, calls and filters are counted and what grows is weighed before it is made.
"""

import contextvars
import datetime
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes, sandbox, visitor

STEPS = 10_000_000
"""Loop rounds, calls and filters of one rendering."""

CHARACTERS = 50_000_000
"""Characters or items that one operation may make, and 40 times that all of them; more for long records."""

SECONDS = 60.0
"""What a rendering may take: the last resort, where single operations are slow."""

_BITS = 100_000
_WIDTHS = (
  "center",
  "expandtabs",
  "indent",
  "ljust",
  "rjust",
  "tojson",
  "wordwrap",
  "zfill",
  "batch",
  "slice",
)


class LimitError(Exception):
  """A template asks for too much; the message says of what."""


class Budget:
  """What one rendering has used, and the {% generation %} spans it has written, in characters."""

  def __init__(self, inputs: Any):
    self.spans: list[tuple[int, int]] = []
    self._inputs, self._room, self._made, self._steps = inputs, CHARACTERS, 0, 0
    self._until = time.monotonic() + SECONDS

  def __enter__(self) -> "Budget":
    self._token = _BUDGET.set(self)
    return self

  def __exit__(self, *error):
    _BUDGET.reset(self._token)

  def step(self, count: int = 1) -> None:
    """Counts steps."""
    before, self._steps = self._steps, self._steps + count
    if self._steps > STEPS:
      raise LimitError(f"it takes more than {STEPS:,} steps")
    # The clock is asked now and then: to ask it takes longer than a step.
    if before // 1000 < self._steps // 1000 and time.monotonic() > self._until:
      raise LimitError(f"it takes longer than {SECONDS:.0f} seconds")

  def make(self, count: int) -> None:
    """Counts characters or items that are about to be made."""
    self._made += count
    if count <= self._room and self._made <= 40 * self._room:
      return
    if self._inputs is not None:  # measured once, and only where it matters
      # A template may write a long record several times over; one that makes much of little is what is
      # refused.
      self._room, self._inputs = CHARACTERS + 16 * _weight(self._inputs), None
      self._made -= count
      self.make(count)
      return
    raise LimitError(f"it makes a text or list of {count:,} and more")

  def number(self, bits: int) -> None:
    """Refuses integers of too many bits."""
    if bits > _BITS:
      raise LimitError(f"it makes a number of {bits:,} bits")

  def call(self, name: str, subject: Any, args: tuple, kwargs: dict) -> None:
    """Counts a call of a method or filter on what it works on."""
    length = _length(subject)
    # A call takes as long as many rounds of a loop, and longer on what is long.
    self.step(20 + length // (1000 if isinstance(subject, str) else 10))
    given = (*args, *kwargs.values())
    if name in _WIDTHS:
      lines = subject.count("\n") + subject.count("\t") if isinstance(subject, str) else length
      self.make(sum((1 + lines) * each for each in given if _is_int(each) and each > 0))
    elif name == "replace" and isinstance(subject, str) and len(args) > 1:
      old, new = map(str, args[:2])
      self.make(length + subject.count(old) * len(new))
    elif name in ("format", "format_map") and isinstance(subject, str):
      self.make(_widths(subject, given))
    elif name == "join":
      separator, items = (
        (subject, args[0]) if isinstance(subject, str) and args else (next(iter(given), ""), subject)
      )
      if isinstance(items, (list, tuple)):
        self.make(sum(map(_length, items)) + len(items) * _length(separator))


_BUDGET: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")


def compile_in(environment: jinja2.Environment, text: str, day: datetime.date) -> "Bounded":
  """Returns a template compiled in one of `transformers`' environments, which becomes a bounded one.

  Args:
    environment: as `transformers` makes it for one template; nobody else's.
    text: the template.
    day: what the template's clock says.

  Raises:
    jinja2.TemplateSyntaxError: it is none.
  """
  become(environment, _Environment, vars(environment))
  environment.template_class = Bounded
  environment.filters = {name: _watched(name, each) for name, each in environment.filters.items()} | {
    "random": _refused("random"),
    _COUNTED: _counted,
    _WEIGHED: _weighed,
  }
  clock = datetime.datetime.combine(day, datetime.time())
  environment.globals |= {"strftime_now": clock.strftime, "lipsum": _refused("lipsum")}
  return environment.from_string(text)


def become(thing: Any, kind: type, attributes: dict[str, Any]) -> None:
  """Makes an object one of another class, with these attributes and no others.

  They are set anew: Python 3.13.0 loses some where the class changes below them.
  """
  attributes = dict(attributes)
  # `transformers` makes the environment inside a function; only its instance can be changed from outside.
  thing.__class__ = kind
  vars(thing).clear()
  vars(thing).update(attributes)


class Bounded(jinja2.Template):
  """A template that renders on the budget of `with Budget(...)`."""

  def render(self, *args: Any, **kwargs: Any) -> str:
    budget, blocks = _BUDGET.get(), []
    with self.environment.activate_tracker(blocks, budget.spans):
      for block in self.generate(*args, **kwargs):
        budget.make(len(block))
        blocks.append(block)
    return "".join(blocks)


class _Environment(sandbox.ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset(("*", "**", "+", "%"))

  def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
    tree = _Counting().visit(super()._parse(source, name, filename))
    return tree.set_environment(self)

  def call_binop(self, context, operator, left, right):
    budget = _BUDGET.get()
    if operator == "%":
      if isinstance(left, str):
        budget.make(_widths(left, right if isinstance(right, tuple) else (right,)))
    elif _is_int(left) and _is_int(right):
      # Of a product or power the size is known before it is made: that is the point of asking here.
      bits = left.bit_length(), right.bit_length()
      budget.number({"**": bits[0] * max(right, 0), "*": sum(bits), "+": max(bits)}[operator])
    elif operator == "*":
      times = next((each for each in (left, right) if _is_int(each)), 0)
      budget.make(max(times, 0) * (_length(left) + _length(right)))
    elif operator == "+":
      budget.make(_length(left) + _length(right))
    return super().call_binop(context, operator, left, right)

  def call(__self, __context, __obj, *args, **kwargs):
    method = getattr(__obj, "__wrapped__", __obj)
    _BUDGET.get().call(getattr(method, "__name__", ""), getattr(method, "__self__", None), args, kwargs)
    return super().call(__context, __obj, *args, **kwargs)


class _Counting(visitor.NodeTransformer):
  """Puts counters around what a loop runs over, and around joined texts."""

  def visit_For(self, node: nodes.For) -> nodes.For:
    node = self.generic_visit(node)
    # In the syntax tree and not in the text: any way to write a loop passes here, comprehensions do not
    # exist.
    node.iter = _filtered(node.iter, _COUNTED)
    return node

  def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
    return _filtered(self.generic_visit(node), _WEIGHED)


_COUNTED, _WEIGHED = "dpojax counted", "dpojax weighed"


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
  return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context  # so that nothing is computed while a template is compiled
def _counted(context, values: Iterable) -> Iterable:
  if isinstance(values, jinja2.Undefined):
    return values
  return _Rounds(values) if hasattr(values, "__len__") else _rounds(values)


class _Rounds:
  """Values that are counted as they are looped over, and of which the number is known."""

  def __init__(self, values: Any):
    self._values = values

  def __iter__(self) -> Iterator:
    return _rounds(self._values)

  def __len__(self) -> int:
    return len(self._values)


def _rounds(values: Iterable) -> Iterator:
  step = _BUDGET.get().step
  for value in values:
    step()
    yield value


@jinja2.pass_context
def _weighed(context, text: Any) -> Any:
  _BUDGET.get().make(_length(text))
  return text


def _watched(name: str, function: Callable) -> Callable:
  first = 1 if hasattr(function, "jinja_pass_arg") else 0

  @functools.wraps(function)
  def watched(*args: Any, **kwargs: Any) -> Any:
    given = list(args)
    # A generator is taken out once, counted as it goes, so that what it makes can be weighed before it is
    # joined.
    if name == "join" and len(given) > first and not isinstance(given[first], (str, list, tuple)):
      given[first] = list(given[first])
    _BUDGET.get().call(name, given[first] if len(given) > first else None, tuple(given[first + 1 :]), kwargs)
    return function(*given, **kwargs)

  return watched


def _refused(name: str) -> Callable:
  def refused(*args: Any, **kwargs: Any):
    raise jinja2.TemplateError(f"{name} draws at random, and the ids of a run must be the same every time")

  return refused


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _length(value: Any) -> int:
  return len(value) if isinstance(value, (str, list, tuple, dict, range)) else 0


def _widths(form: str, given: tuple) -> int:
  """Characters that a format makes beside its arguments, at most."""
  stars = sum(each for each in given if _is_int(each) and each > 0) if "*" in form or "{" in form else 0
  return len(form) + stars + sum(int(width[:12]) for width in re.findall(r"\d+", form))


def _weight(value: Any) -> int:
  """Characters in a value and all it holds."""
  if isinstance(value, str):
    return len(value)
  if isinstance(value, dict):
    return sum(_weight(key) + _weight(each) for key, each in value.items())
  return sum(map(_weight, value)) if isinstance(value, (list, tuple)) else 1
