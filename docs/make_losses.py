"""Fills the generated blocks of docs/losses.md: formulas from docstrings, tables by running losses.

python -m docs.make_losses           rewrites docs/losses.md
python -m docs.make_losses --check   fails if the page is not what this makes of it
"""

import argparse
import functools
import inspect
import pathlib
import re
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from docs.losses_facts import BETA_IN_WORDS, NAMES, PAPERS, READ, SETTINGS
from dpojax import losses
from dpojax.losses import Pair
from dpojax.training import preference

PAGE = pathlib.Path(__file__).parent / "losses.md"
BETAS = (0.05, 0.1, 0.5)

# Docstrings.


class Entry(NamedTuple):
  """A public function as its source describes it."""

  name: str
  group: str
  signature: str
  doc: str

  @property
  def formula(self) -> str:
    """The first sentence without its verb, shape and citation."""
    citation = r" \((?:\w+, )?[A-Z][\w']*(?: et al\.)? \d{4}[a-z]?[^()]*\)"
    text = re.sub(citation, "", _joined(self.doc.split("\n\n")[0]))
    text = re.match(r"Returns (.*?)(?:\.$|\. [A-Zai]|: [A-Z])", text).group(1)
    text = re.sub(r"(, \[\.[^\]]*\]|, the baseline .*)+$", "", text)
    return text if re.match(r"(the|summed|alpha policy)\b", text) else f"`{text}`"

  @property
  def citations(self) -> list[tuple[str, str]]:
    """(paper, equation) in order of mention, each paper once."""
    found = re.findall(
      r"([A-Z][\w']+(?: et al\.)? \d{4}[a-z]?)"
      r"(?:,? \(?((?:Eq\. [\d.]*\d(?: and \d+)?|Sec\. \d+|App\. [A-Z]\.\d+)))?",
      _joined(self.doc),
    )
    places = {}
    for paper, place in found:
      places[paper] = places.get(paper) or place
    return list(places.items())


def _joined(doc: str) -> str:
  """The docstring's first paragraph and the rest, on one line."""
  return " ".join(doc.split())


def entries() -> list[Entry]:
  """Returns the public functions of `dpojax.losses` in their order, under the comments' titles."""
  group, found = "", []
  for line in inspect.getsource(losses).splitlines():
    if line.startswith("# "):
      group = line[2:].rstrip(".")
    if (match := re.match(r"def ([a-z]\w*)\(", line)) is None:
      continue
    function = vars(losses)[match.group(1)]
    assert isinstance(function, types.FunctionType)
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=p.empty) for p in parameters]
    text = f"{function.__name__}{inspect.Signature(plain)}"
    found.append(Entry(function.__name__, group, text, inspect.getdoc(function)))
  return found


def cite(entry: Entry) -> str:
  return "; ".join(
    f"[{paper}]({PAPERS[paper]})" + (f", {place}" if place else "") for paper, place in entry.citations
  )


def config_names(name: str) -> str:
  """Returns what `config.loss` calls a function."""
  found = []
  for key, loss in preference.LOSSES.items():
    function = getattr(loss.function, "func", loss.function)
    if function.__name__ == name:
      found.append(f"`{key}`")
  return ", ".join(found)


def overview() -> str:
  """One row a function: what it returns, where it is from, what a config calls it."""
  blocks = []
  for group in dict.fromkeys(entry.group for entry in entries()):
    rows = [
      (f"[`{e.name}`](#{e.name})", e.formula, cite(e), config_names(e.name))
      for e in entries()
      if e.group == group
    ]
    head = ("function", "returns", "source", "`config.loss`")
    blocks.append(f"**{group}**\n\n{table(head, rows)}")
  return "\n\n".join(blocks)


def functions() -> str:
  """A section for each function: its signature and its docstring."""
  return "\n\n".join(f"### `{e.name}`\n\n`{e.signature}`\n\n{markdown(e.doc)}" for e in entries())


def markdown(doc: str) -> str:
  """Returns a docstring's paragraphs, with its Args and Raises as lists."""
  parts = []
  for paragraph in doc.split("\n\n"):
    if re.match(r"(Args|Raises):\n", paragraph):
      title, rest = paragraph.split("\n", 1)
      items = re.split(r"\n(?=  \S)", "\n" + rest)[1:]
      lines = []
      for item in items:
        names, text = _joined(item).split(": ", 1)
        lines.append(f"- {', '.join(f'`{n}`' for n in names.split(', '))}: {text}")
      parts.append(("Raises:\n\n" if title == "Raises:" else "") + "\n".join(lines))
    else:
      parts.append(_joined(paragraph))
  return "\n\n".join(parts)


# Measurements.


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  """Returns a Markdown table."""
  line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
  return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def number(x: float) -> str:
  """Three significant digits."""
  text = f"{float(x):.3g}"
  return "0" if float(text) == 0 else text


def numbers(values, show: Callable = number) -> str:
  """The values of a sweep in one cell, once if they are all the same."""
  shown = [show(x) for x in values]
  return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def code(name: str) -> str:
  """`loss`, with what follows its first comma left as it is."""
  return re.sub(r"^[^,]+", r"`\g<0>`", name)


def of_ratios(name: str) -> Callable:
  """Returns the loss as a function of h_w, h_l and beta."""
  key, _, options = name.partition(", ")
  knobs = {options.split()[0]: float(options.split()[1])} if options else {}

  def loss(chosen, rejected, beta):
    zero = jnp.zeros_like(chosen)
    return losses.PAIRWISE_LOSSES[key](Pair(chosen, rejected), Pair(zero, zero), beta=beta, **knobs)

  return loss


def measured(loss: Callable, chosen: float, rejected: float, sweep) -> tuple[str, str, str]:
  """Cells of the value of loss(chosen, rejected, knob) and of its push on each, swept over a knob."""
  run = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), in_axes=(None, None, 0))
  value, slopes = run(jnp.float64(chosen), jnp.float64(rejected), jnp.asarray(sweep))
  signed = lambda x: f"{x:+.3g}" if abs(x) > 1e-12 else "0"
  return numbers(value), *(numbers(-slope, signed) for slope in slopes)


def at(chosen: float, rejected: float) -> str:
  """Every pairwise loss at one place, for each beta."""
  rows = [(code(name), *measured(of_ratios(name), chosen, rejected, BETAS)) for name in BETA_IN_WORDS]
  return table(("loss", "value", "push on chosen", "push on rejected"), rows)


def resting_points(slope: Callable) -> list[float]:
  """Returns where a slope turns from falling to flat or rising; inf or -inf for never, that way."""
  grid = np.linspace(-200.0, 200.0, 2001) + 1e-3  # no step on a whole number
  slopes = np.asarray(slope(jnp.asarray(grid)))
  falling, rising = slopes < -1e-9, slopes > 1e-9  # less is rounding
  turns = np.flatnonzero(falling[:-1] & ~falling[1:] & (slopes[1:] > -1e-11))
  points = []
  for low, high in zip(grid[turns], grid[turns + 1]):
    for _ in range(3):  # each time 2000 times closer
      finer = np.linspace(low, high, len(grid))
      turn = np.argmax(np.asarray(slope(jnp.asarray(finer))) >= 0)
      low, high = finer[turn - 1], finer[turn]
    points.append(high)
  first, last = (turns[0], turns[-1] + 1) if points else (len(grid), 0)
  return [-np.inf] * bool(rising[:first].any()) + points + [np.inf] * bool(falling[last:].any())


def resting() -> str:
  """Where each loss comes to rest for each beta, and what beta does in words."""

  def show(points):
    words = {np.inf: "rises", -np.inf: "falls"}
    return " and ".join(words.get(x) or number(x) for x in points) or "flat"

  of_chosen = lambda loss: lambda h, beta: loss(h, jnp.zeros_like(h), beta)
  of_rejected = lambda loss: lambda h, beta: loss(jnp.zeros_like(h), h, beta)
  rows = []
  for name, words in BETA_IN_WORDS.items():
    cells = []
    for one in (of_chosen, of_rejected):
      slope = jax.jit(jax.vmap(jax.grad(one(of_ratios(name))), in_axes=(0, None)))
      points = [resting_points(functools.partial(lambda s, b, h: s(h, b), slope, beta)) for beta in BETAS]
      cells.append(numbers(points, show))
    rows.append((code(name), *cells, words))
  return table(("loss", "chosen rests at", "rejected rests at", "a larger beta"), rows)


def other_knobs() -> str:
  """Losses of other inputs or other knobs, swept one knob at a time."""
  f_dpo = functools.partial(losses.f_dpo_loss, divergence=losses.alpha_divergence)
  ratios, means, sums = ("ratios", -2.0, -6.0), ("means", -1.0, -1.5), ("sums", -40.0, -50.0)

  def knob(loss, name):
    return lambda w, l, x: loss(Pair(w, l), Pair(0.0 * w, 0.0 * l), beta=0.1, **{name: x})

  def both(loss, **fixed):
    desirable = jnp.array([True, False])
    return lambda w, l, x: loss(jnp.stack([w, l]), desirable, beta=x, **fixed).sum()

  sweeps = [
    (
      "`dpo_loss`, beta 0.1",
      ratios,
      "label_smoothing",
      (0.0, 0.1, 0.3),
      knob(losses.dpo_loss, "label_smoothing"),
    ),
    (
      "`robust_dpo_loss`, beta 0.1",
      ratios,
      "label_smoothing",
      (0.0, 0.1, 0.3),
      knob(losses.robust_dpo_loss, "label_smoothing"),
    ),
    (
      "`exo_pair_loss`, beta 0.1",
      ratios,
      "label_smoothing",
      (0.001, 0.1, 0.3),
      knob(losses.exo_pair_loss, "label_smoothing"),
    ),
    ("`bco_pair_loss`, beta 0.1", ratios, "delta", (-0.5, 0.0, 0.5), knob(losses.bco_pair_loss, "delta")),
    ("`discopop_loss`, beta 0.1", ratios, "tau", (0.05, 0.5, 1.0), knob(losses.discopop_loss, "tau")),
    ("`f_dpo_loss`, `alpha_divergence`, beta 0.1", ratios, "alpha", (0.1, 0.5, 0.9), knob(f_dpo, "alpha")),
    ("`kto_loss`, kl 1", ratios, "beta", BETAS, both(losses.kto_loss, kl=1.0)),
    ("`bco_loss`", ratios, "beta", BETAS, both(losses.bco_loss)),
    (
      "`simpo_loss`, gamma = beta / 2",
      means,
      "beta",
      (2.0, 2.5, 10.0),
      lambda w, l, x: losses.simpo_loss(Pair(w, l), beta=x, gamma=x / 2),
    ),
    (
      "`simpo_loss`, beta 2.5",
      means,
      "gamma",
      (0.5, 1.0, 1.5),
      lambda w, l, x: losses.simpo_loss(Pair(w, l), beta=2.5, gamma=x),
    ),
    ("`orpo_loss`", means, "weight", BETAS, lambda w, l, x: losses.orpo_loss(Pair(w, l), weight=x)),
    ("`cpo_loss`", sums, "beta", BETAS, lambda w, l, x: losses.cpo_loss(Pair(w, l), beta=x)),
    (
      "`unlikelihood_loss`",
      sums,
      "alpha",
      BETAS,
      lambda w, l, x: losses.unlikelihood_loss(Pair(w, l), alpha=x),
    ),
    ("`dpop_loss`, beta 0.1", ratios, "weight", (0.0, 5.0, 50.0), knob(losses.dpop_loss, "weight")),
    ("`cal_dpo_loss`, beta 0.1", ratios, "weight", (0.0, 0.5, 1.0), knob(losses.cal_dpo_loss, "weight")),
    ("`bdpo_loss`, beta 0.1", ratios, "mix", (0.1, 0.5, 0.9), knob(losses.bdpo_loss, "mix")),
    ("`odpo_loss`, beta 0.1", ratios, "margin", (0.0, 0.5, 1.0), knob(losses.odpo_loss, "margin")),
    ("`mappo_loss`, beta 0.1", ratios, "gap", (0.0, 0.5, 1.0), knob(losses.mappo_loss, "gap")),
    (
      "`r_dpo_loss`, beta 0.1, 20 and 10 tokens",
      ratios,
      "alpha",
      (0.0, 0.01, 0.05),
      lambda w, l, x: losses.r_dpo_loss(
        Pair(w, l), Pair(0.0 * w, 0.0 * l), Pair(20.0, 10.0), beta=0.1, alpha=x
      ),
    ),
    (
      "`h_dpo_loss`, beta 0.1, a reference of zeros",
      sums,
      "alpha",
      (0.8, 1.0, 1.2),
      lambda w, l, x: losses.h_dpo_loss(Pair(w, l), Pair(0.0 * w, 0.0 * l), beta=0.1, alpha=x),
    ),
    (
      "`tdpo1_loss`, D 1 and 3",
      ratios,
      "beta",
      BETAS,
      lambda w, l, x: losses.tdpo1_loss(Pair(w, l), Pair(0.0 * w, 0.0 * l), Pair(1.0, 3.0), beta=x),
    ),
    (
      "`tdpo2_loss`, beta 0.1, D 1 and 3",
      ratios,
      "alpha",
      (0.0, 0.5, 1.0),
      lambda w, l, x: losses.tdpo2_loss(
        Pair(w, l), Pair(0.0 * w, 0.0 * l), Pair(1.0, 3.0), beta=0.1, alpha=x
      ),
    ),
    (
      "`beta_dpo_loss`, beta 0.1, center 2",
      ratios,
      "alpha",
      (0.0, 0.3, 0.6),
      lambda w, l, x: losses.beta_dpo_loss(
        Pair(w[None], l[None]), Pair(0.0 * w[None], 0.0 * l[None]), beta=0.1, center=2.0, alpha=x
      )[0],
    ),
    (
      "`epsilon_dpo_loss`, beta 0.1, s = 1",
      ratios,
      "epsilon",
      (0.0, 0.01, 0.1),
      lambda w, l, x: losses.epsilon_dpo_loss(
        Pair(w, l), Pair(0.0 * w, 0.0 * l), Pair(w - 1, l), Pair(w + 1, l), beta=0.1, epsilon=x
      ),
    ),
    (
      "`alphapo_loss`, beta 2.5, gamma 0.5",
      means,
      "alpha",
      (0.01, 0.25, 1.0),
      lambda w, l, x: losses.alphapo_loss(Pair(w, l), beta=2.5, gamma=0.5, alpha=x),
    ),
    (
      "`xpo_loss` of the rejected response, beta 0.1",
      ratios,
      "alpha",
      (0.0, 1e-3, 1e-2),
      lambda w, l, x: losses.xpo_loss(Pair(w, l), Pair(0.0 * w, 0.0 * l), l, beta=0.1, alpha=x),
    ),
  ]
  rows = [
    (name, inputs, f"{sweep} {numbers(values)}", *measured(loss, *place, values))
    for name, (inputs, *place), sweep, values, loss in sweeps
  ]
  return table(("loss", "of", "knob", "value", "push on chosen", "push on rejected"), rows)


def kl_estimators() -> str:
  """Mean and standard deviation of one sample's estimate, counted over 8 tokens."""
  rows = []
  start = jnp.cos(jnp.arange(8.0, dtype=jnp.float64))
  for distance in (0.1, 1.0, 3.0):
    theirs = jax.nn.log_softmax(start)
    ours = jax.nn.log_softmax(start + distance * jnp.sin(3 * jnp.arange(8.0)))
    cells = []
    for estimate in (losses.kl_k1, losses.kl_k2, losses.kl_k3):
      values = estimate(ours, theirs)
      mean = jnp.sum(jnp.exp(ours) * values)
      deviation = jnp.sqrt(jnp.sum(jnp.exp(ours) * jnp.square(values - mean)))
      cells.append(f"{number(mean)} +- {number(deviation)}")
    rows.append((number(losses.token_kl(ours, theirs)), *cells))
  return table(("`token_kl`, exact", "`kl_k1`", "`kl_k2`", "`kl_k3`"), rows)


# The page.


def names() -> str:
  head = ("dpojax", "TRL 1.16", "reference implementation", "Tunix", "MaxText")
  return table(head, [(key, *(cell or "–" for cell in row)) for key, row in NAMES.items()])


def read() -> str:
  head = ("function", "read in", "where readings differ")
  return table(head, [(f"`{name}`", *cells) for name, cells in READ.items()])


def settings() -> str:
  head = ("loss", "knobs", "training", "as reported by")
  return table(head, [tuple(cell or "–" for cell in row) for row in SETTINGS])


BLOCKS = {
  "overview": overview,
  "functions": functions,
  "at the start": lambda: at(0, 0),
  "later": lambda: at(-2, -6),
  "resting": resting,
  "other knobs": other_knobs,
  "kl estimators": kl_estimators,
  "names": names,
  "settings": settings,
  "read": read,
}


def fill(page: str) -> str:
  """Returns the page with every generated block made anew.

  Raises:
    ValueError: a block of the page is not known, or one is missing from it.
  """
  pattern = re.compile(r"(<!-- begin: (.*?) -->\n).*?(\n<!-- end -->)", re.DOTALL)
  there = [match.group(2) for match in pattern.finditer(page)]
  if sorted(there) != sorted(BLOCKS):
    raise ValueError(f"the page has blocks {sorted(there)}, to be made are {sorted(BLOCKS)}")
  with jax.enable_x64(True):
    return pattern.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[3], page)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true", help="write nothing, fail if it would change")
  page = PAGE.read_text()
  new = fill(page)
  if parser.parse_args().check:
    sys.exit(new != page and f"{PAGE} is not up to date: python -m docs.make_losses")
  PAGE.write_text(new)


if __name__ == "__main__":
  main()
