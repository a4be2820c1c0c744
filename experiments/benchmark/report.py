"""The benchmark's table and plot, from what its sides measured."""

import pathlib
import statistics
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt


def counted_seconds(side: str, result: dict[str, Any]) -> list[float]:
  """Times that count: a peer's first step warms it up, dpojax has told its compiled ones apart."""
  return result["seconds"] if side.startswith("dpojax") else result["seconds"][1:]


def summarize(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
  """Returns by side the median and range of pairs a second over all counted steps, and the rest."""
  settings, out = summary["settings"], {}
  for side, runs in summary["results"].items():
    if not runs:
      continue
    seconds = [each for run in runs for each in counted_seconds(side, run)]
    rates = sorted(settings["batch_size"] / each for each in seconds)
    median = statistics.median(rates)
    out[side] = {
      "pairs_per_second": median,
      "slowest": rates[0],
      "fastest": rates[-1],
      "tokens_per_second": median * summary["tokens_per_pair"],
      "peak_gib": statistics.median(run["peak_bytes"] for run in runs) / 2**30,
      "of_matmul_rate": (summary["flops"][side] * median / settings["batch_size"] / summary["matmul_flops"]),
      "compile_seconds": statistics.median(run.get("compile", 0.0) for run in runs),
      "row_fill": statistics.median(run.get("row_fill", float("nan")) for run in runs),
      "part": runs[0].get("micro") or settings.get("rows_at_once") or 0,
      "steps": len(seconds),
    }
  return out


def table(summary: dict[str, Any]) -> str:
  """Returns the table as Markdown."""
  sides = summarize(summary)
  versions = {
    name: version
    for runs in summary["results"].values()
    for run in runs
    for name, version in run["versions"].items()
  }
  lines = [
    f"Case `{summary['case']}`, {summary['date']}, Python {summary['python']}, "
    + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    + f"; this machine multiplies matrices at {summary['matmul_flops'] / 1e9:.0f} GFLOP/s.",
    "",
    "| side | pairs/s, median (range) | times dpojax | real tokens/s | peak memory, GiB | of the "
    "matmul rate, on necessary FLOPs | compile, s | row fill | steps |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  own = sides.get("dpojax", next(iter(sides.values())))["pairs_per_second"]
  for side, each in sides.items():
    fill = f"{each['row_fill']:.1%}" if each["row_fill"] == each["row_fill"] else "-"
    lines.append(
      f"| {side} | {each['pairs_per_second']:.2f} ({each['slowest']:.2f} to "
      f"{each['fastest']:.2f}) | {each['pairs_per_second'] / own:.3f} | "
      f"{each['tokens_per_second']:,.0f} | {each['peak_gib']:.2f} | "
      f"{each['of_matmul_rate']:.0%} | {each['compile_seconds']:.0f} | {fill} | {each['steps']} |"
    )
  return "\n".join(lines) + "\n"


def write(summary: dict[str, Any], folder: pathlib.Path) -> str:
  """Writes CASE.md and CASE.png into the folder; returns the table."""
  text, sides = table(summary), summarize(summary)
  (folder / f"{summary['case']}.md").write_text(text)
  figure, axes = plt.subplots(1, 2, figsize=(9, 0.6 + 0.45 * len(sides)), sharey=True)
  names = list(sides)[::-1]
  for axis, key, label in (
    (axes[0], "pairs_per_second", "pairs a second"),
    (axes[1], "peak_gib", "peak memory, GiB"),
  ):
    bars = axis.barh(names, [sides[name][key] for name in names], color="0.45")
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set_xlabel(label)
    axis.margins(x=0.18)
    axis.spines[["top", "right"]].set_visible(False)
  figure.tight_layout()
  figure.savefig(folder / f"{summary['case']}.png", dpi=150)
  plt.close(figure)
  return text
