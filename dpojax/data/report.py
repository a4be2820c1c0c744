"""What was read, cut and left out, in words: a short table, and comparisons as they will be scored."""

import json
from collections.abc import Iterator
from typing import Any

_OF_TOKENS = {
  "prompts_cut": "prompts cut to data.max_prompt_length",
  "responses_cut": "responses cut to what data.max_length leaves",
  "with_special_tokens_in_text": "with a special token's name in their text; see data.special_tokens",
  "with_special_tokens_that_the_template_reads": "of these, read by the chat template itself",
  "prompts_rendered_otherwise_with_an_answer": "prompts that the template writes otherwise with an answer",
  "with_text_that_the_template_leaves_out": "conversations of which the chat template leaves out text",
  "with_calls_that_the_template_leaves_out": "conversations of which the chat template leaves out tool calls",
  "with_tools_that_the_template_leaves_out": "conversations of which the chat template leaves out the tools",
  "responses_ended_with_eos_that_the_template_lacks": "responses ended with EOS, as the template has none",
  "without_bos": "conversations without the BOS that a text would get, as the template has none",
  "prompts_started_with_eos": "empty prompts started with EOS",
  "changed_by_tokenizer": "texts that the tokenizer changes, of the first that were checked",
  "slow": "slow comparisons",
}
"""Counts of tokens that are said where they are not 0."""


def table(report: dict) -> str:
  """Returns a report as lines of what there is and, indented, what was cut or left out of it and why."""
  lines = []
  for name, part in report.items():
    if not isinstance(part, dict):
      continue
    records, tokens = part["records"], part["tokens"]
    lines.append(f"{name} records: {_flat({k: v for k, v in records.items() if not isinstance(v, dict)})}")
    for key, value in records.items():
      if isinstance(value, dict) and value:
        lines.append(f"  {key}: {_flat(value)}")
    lines += [
      f"  {knob} of the data, in the place of the config's: {_flat(values)}"
      for knob, values in part.get("columns", {}).items()
    ]
    lines += [f"  the first of {reason}: {problem}" for reason, problem in part.get("problems", {}).items()]
    lengths = ", ".join(
      f"{key} {each['50']} (longest {each['100']})" for key, each in tokens["lengths"].items()
    )
    lines.append(
      f"{name} comparisons in ids: {tokens['used']} of {tokens['examples']}; median tokens: {lengths}"
    )
    for reason, count in tokens["dropped"].items():
      lines.append(f"  {count} left out, {reason}: {tokens['first'].get(reason, '')}")
    lines += [
      f"  {tokens[key]} {words}" + (f": {tokens['first'][key]}" if key in tokens["first"] else "")
      for key, words in _OF_TOKENS.items()
      if tokens.get(key)
    ]
    if tokens["ended_by"]:
      lines.append(f"  responses end with {_flat(tokens['ended_by'])}")
  lines += [f"{count} {name}" for name, count in report.items() if not isinstance(count, dict)]
  return "\n".join(lines)


def differences(before: dict, now: dict) -> str:
  """Returns what two reports say their ids were made from, where it differs."""
  changed = []
  for name in before.keys() & now.keys():
    if isinstance(now[name], dict) and isinstance(before[name], dict):
      was, are = (each[name].get("tokens", {}).get("inputs", {}) for each in (before, now))
      changed += [
        f"{key} of the {name} data"
        + (f" ({was.get(key)!r}, now {are.get(key)!r})" if len(f"{was.get(key)}{are.get(key)}") < 100 else "")
        for key in sorted(was.keys() | are.keys())
        if was.get(key) != are.get(key)
      ]
  return ", ".join(changed)


_COLOURS = {"prompt": "\033[34m", "scored": "\033[32m", "not scored": "\033[90m"}


def shown(tokenizer: Any, comparison: tuple, scored: list | None, *, coloured: bool) -> str:
  """Returns a comparison as it is scored: prompt, what is scored and what is not.

  Args:
    tokenizer: of the ids.
    comparison: ids of the prompt and of each response.
    scored: which ids of each response are scored; None is all.
    coloured: for a terminal; else each part has a line with its name and its text as JSON writes it.
  """
  prompt, responses = comparison
  lines = []
  for k, response in enumerate(responses):
    if not len(response):
      lines.append(f"response {k + 1} of {len(responses)}: absent")
      continue
    which = [True] * len(response) if scored is None else list(map(bool, scored[k]))
    # Behind no prompt the first token has nothing that predicts it.
    count = sum(which) - (which[0] and not len(prompt))
    lines.append(
      f"response {k + 1} of {len(responses)}: {len(prompt)} tokens of the prompt, {len(response)} of the "
      f"response, {count} scored"
    )
    parts = list(
      _parts(
        tokenizer,
        [*prompt, *response],
        [*["prompt"] * len(prompt), *("scored" if each else "not scored" for each in which)],
      )
    )
    if coloured:
      lines.append("".join(f"{_COLOURS[name]}{text}\033[0m" for name, text in parts))
    else:
      lines += [f"  {name:<10}  {json.dumps(text, ensure_ascii=False)}" for name, text in parts]
  return "\n".join(lines)


def legend() -> str:
  """Returns what the colours of `shown` stand for."""
  return "  ".join(f"{colour}{name}\033[0m" for name, colour in _COLOURS.items())


def _parts(tokenizer: Any, ids: list[int], names: list[str]) -> Iterator[tuple[str, str]]:
  """Yields runs of ids of one name as text; joined they are the text of all."""
  decode = lambda count: tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
  start, before = 0, ""
  for i in range(1, len(ids) + 1):
    if i == len(ids) or names[i] != names[start]:
      # All up to here, and what was there before taken off: a letter of several tokens is none by parts.
      text = decode(i)
      yield names[start], text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[start:i])
      start, before = i, text


def _flat(value: dict) -> str:
  return ", ".join(
    f"{name} {f'({_flat(each)})' if isinstance(each, dict) else each}"
    for name, each in value.items()
    if each != {}
  )
