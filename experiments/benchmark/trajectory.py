"""The same steps in dpojax and TRL: one folder, one order of pairs, AdamW, float32; all params or an adapter.

Both sides report every step; where they part is told for the loss, the margin and both log-ratios. TRL's ids
are held to dpojax's before its first step.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.benchmark import inputs

FORMS = {"all params": {"rank": 0, "learning_rate": 1e-6}, "adapter": {"rank": 16, "learning_rate": 1e-4}}

COMPARED = ("loss", "margin", "log-ratio, chosen", "log-ratio, rejected")


def values_of(line: dict[str, float], beta: float) -> list[float]:
  """Returns `COMPARED` of one step of either side."""
  return [
    line["loss"],
    line["rewards/margins"],
    line["rewards/chosen"] / beta,
    line["rewards/rejected"] / beta,
  ]


def differences(ours: Sequence[dict], theirs: Sequence[dict], beta: float) -> np.ndarray:
  """Returns |ours - theirs| of every step and of each of `COMPARED`, [steps, 4]."""
  table = lambda lines: np.array([values_of(line, beta) for line in lines], np.float64)
  return np.abs(table(ours) - table(theirs))


def run(
  settings: dict[str, Any],
  folder: pathlib.Path,
  run_side: Callable[[str, dict, pathlib.Path], dict],
  forms: Sequence[str] = tuple(FORMS),
) -> dict[str, dict]:
  """Runs both sides in every form and returns their traces; what is there of these settings is not run again.

  Args:
    settings: of the benchmark; `steps` of `batch_size` pairs.
    folder: where everything is written.
    run_side: (side, settings, folder) -> what the side found.
    forms: of `FORMS`.
  """
  found = {}
  for form in forms:
    out = folder / form.replace(" ", "_")
    out.mkdir(parents=True, exist_ok=True)
    given = settings | FORMS[form] | {"check_ids": True, "micro": settings["batch_size"]}
    given |= {"adapter": str(out / "adapter")} if given["rank"] else {}
    given |= inputs.write_pairs(given, inputs.make_loader(inputs.run_config(given)), out)
    given = json.loads(json.dumps(given))  # as it is read back
    found[form] = {}
    for side in ("dpojax", "trl"):
      path = out / f"{side}.json"
      kept = json.loads(path.read_text()) if path.exists() else {}
      if kept.get("given") != given:
        result = run_side(side, given, out)
        if "failed" in result:
          raise RuntimeError(f"{side}, {form}: {result['failed']}; {out / side}.log says more")
        kept = json.loads(json.dumps(result | {"given": given}))
        path.write_text(json.dumps(kept))
      found[form][side] = kept
  return found


def table(found: dict[str, dict], beta: float) -> str:
  """Returns how far apart the two sides are, the first step, the last and the most of all."""
  lines = [
    "| trained | of all steps | " + " | ".join(f"apart in {name}" for name in COMPARED) + " |",
    "|---|---|" + "---|" * len(COMPARED),
  ]
  for form, sides in found.items():
    apart = differences(*(sides[side]["trace"] for side in ("dpojax", "trl")), beta)
    for name, values in (
      ("the first", apart[0]),
      (f"the last of {len(apart)}", apart[-1]),
      ("the most", apart.max(0)),
    ):
      lines.append(f"| {form} | {name} | " + " | ".join(f"{value:.1e}" for value in values) + " |")
  lines += [
    "",
    "| trained | step | side | " + " | ".join(COMPARED) + " |",
    "|---|---|---|" + "---|" * len(COMPARED),
  ]
  for form, sides in found.items():
    count = len(sides["dpojax"]["trace"])
    for step in sorted({1, (count + 1) // 2, count}):
      for side in ("dpojax", "trl"):
        values = values_of(sides[side]["trace"][step - 1], beta)
        lines.append(f"| {form} | {step} | {side} | " + " | ".join(f"{value:.6f}" for value in values) + " |")
  return "\n".join(lines) + "\n"
