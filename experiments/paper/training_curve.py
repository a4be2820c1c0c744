"""True reward and KL along training (the paper's Figure 3, right).

python -m experiments.paper.training_curve --workdir=runs/sentiment

Reads the frontier.jsonl that `experiments.paper.frontier` wrote there; means over seeds, with their standard
errors. Writes training_curve.png.
"""

import argparse
import pathlib
from collections.abc import Sequence

from experiments import figures
from experiments.command import folder_argument
from experiments.paper import frontier, methods
from experiments.paper.methods import Line


def plot(lines: Sequence[Line], path: pathlib.Path) -> None:
  """Draws reward and KL of each setting of DPO and of PPO against the step."""
  figure, axes = figures.panels(4, columns=2, size=(4.2, 3.0))
  for row, method in enumerate((frontier.DPO, frontier.PPO)):
    ours = [line for line in lines if line["method"] == method]
    for column, name in enumerate(("reward", "kl")):
      panel = axes[2 * row + column]
      for number, setting in enumerate(sorted({line["setting"] for line in ours})):
        points = [line | {"setting": line["step"]} for line in ours if line["setting"] == setting]
        spread = methods.over_seeds(points, name)
        steps = sorted(step for _, step in spread)
        panel.errorbar(
          steps,
          [spread[method, step][0] for step in steps],
          yerr=[spread[method, step][1] for step in steps],
          capsize=2,
          markersize=3,
          linewidth=1,
          label=f"{method}, {'beta' if method == frontier.DPO else 'target KL'} {setting:g}",
          **figures.style(number),
        )
      panel.set_xlabel("step" if method == frontier.DPO else "rollout of 1024 samples")
      panel.set_ylabel({"reward": "true reward", "kl": "KL, nats"}[name])
      if ours:
        panel.legend(frameon=False, fontsize=6)
  figures.save(figure, path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--workdir", type=folder_argument, required=True)
  folder = parser.parse_args().workdir.absolute()
  plot(frontier.read(folder), folder / "training_curve.png")
  print(f"written: {folder}/training_curve.png")


if __name__ == "__main__":
  main()
