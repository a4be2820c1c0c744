"""Which of two responses is better: the paper's questions, who answers them, and the win rate.

A judge is shown the two responses as A and B, in an order drawn for each pair, so that one who
prefers a place and not a response comes to one half. What cannot be read as an answer is counted and
left out; ties count half.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import requests
import tqdm

from dpojax.data.examples import Example
from dpojax.evaluate import confidence
from dpojax.evaluate.confidence import Estimate
from dpojax.runtime import appending, digests, paths
from dpojax.runtime.disk import disk_errors
from dpojax.runtime.errors import UserError
from dpojax.runtime.ownership import owned

_SUMMARIES = """

Post:
{prompt}

Summary A:
{a}

Summary B:
{b}

FIRST provide a one-sentence comparison of the two summaries, explaining which you prefer and why. \
SECOND, on a new line, state only "A" or "B" to indicate your choice. Your response should use the \
format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">"""

QUESTIONS = {
  "summary": (
    "Which of the following summaries does a better job of summarizing the most important points "
    "in the given forum post?" + _SUMMARIES
  ),
  "concise_summary": (
    "Which of the following summaries does a better job of summarizing the most important points "
    "in the given forum post, without including unimportant or irrelevant details? A good summary "
    "is both precise and concise." + _SUMMARIES
  ),
  "dialogue": """\
For the following query to a chatbot, which response is more helpful?

Query: {prompt}

Response A:
{a}

Response B:
{b}

FIRST provide a one-sentence comparison of the two responses and explain which you feel is more \
helpful. SECOND, on a new line, state only "A" or "B" to indicate which response is more helpful. \
Your response should use the format:
Comparison: <one-sentence comparison and explanation>
More helpful: <"A" or "B">""",
}
QUESTIONS |= {
  name.replace("summary", "news_summary"): QUESTIONS[name].replace("forum post", "news article")
  for name in ("summary", "concise_summary")
}
"""The prompts of Rafailov et al. 2023, App. C.2: GPT-4 (S), GPT-4 (C), that for dialogue, and (S) and (C)
about news articles, for the paper's Table 1."""

VERDICTS = ("A", "B", "tie", "refused", "unparseable")


class JudgeError(UserError, RuntimeError):
  """A judge cannot be asked; the message says why and what to do."""


class Pair(NamedTuple):
  """Two responses to one prompt, of which the first is ours: in text, or as a reward model reads them."""

  prompt: str | list[dict] | Example
  ours: str | list[dict]
  theirs: str | list[dict]


Judge = Callable[[Sequence[Pair]], list[str]]
"""Pairs as they are shown, (prompt, A, B) -> of each a verdict of `VERDICTS`."""


@dataclasses.dataclass(frozen=True)
class Result:
  """What a judge said of pairs.

  Attributes:
    outcomes: of each pair 'win', 'loss', 'tie', 'refused' or 'unparseable', from our side.
    win_rate: wins and half of the ties, of those that were judged.
    said_a: share of A among the answers A and B; far from one half it tells of a judge who prefers
      a place, or of chance.
  """

  outcomes: list[str]
  win_rate: Estimate
  said_a: Estimate


def compare(judge: Judge, pairs: Sequence[Pair], groups: Sequence[int], *, seed: int) -> Result:
  """Asks a judge which response of each pair is better.

  Args:
    judge: who answers.
    pairs: the pairs.
    groups: of each pair the prompt it belongs to. Where prompts have several pairs the interval is
      a bootstrap over prompts, else Wilson's.
    seed: decides which pairs are shown with theirs first.

  Raises:
    JudgeError: the judge cannot be asked.
  """
  if not pairs:
    raise JudgeError("there are no pairs to judge; give files of samples that are not empty")
  # A judge may prefer the first place: half of the pairs are shown the other way round.
  swapped = np.random.default_rng([seed, 3]).random(len(pairs)) < 0.5
  verdicts = judge([Pair(p, b, a) if swap else Pair(p, a, b) for (p, a, b), swap in zip(pairs, swapped)])
  won = {False: {"A": "win", "B": "loss"}, True: {"A": "loss", "B": "win"}}
  outcomes = [won[bool(swap)].get(verdict, verdict) for verdict, swap in zip(verdicts, swapped)]
  chosen = [verdict for verdict in verdicts if verdict in ("A", "B")]
  return Result(outcomes, win_rate(outcomes, groups), confidence.share(chosen.count("A"), len(chosen)))


def win_rate(outcomes: Sequence[str], groups: Sequence[int]) -> Estimate:
  """Returns wins and half of the ties over wins, ties and losses; see `compare`."""
  worth = {"win": 1.0, "tie": 0.5, "loss": 0.0}
  values = np.array([worth[outcome] for outcome in outcomes if outcome in worth])
  of = np.array([group for outcome, group in zip(outcomes, groups) if outcome in worth])
  names, index = np.unique(of, return_inverse=True)
  # A pair a prompt: the interval of a share. Several of one prompt are not independent.
  if len(names) == len(values):
    return confidence.share(float(values.sum()), len(values))
  ratio = lambda sums, counts: sums.sum(axis=-1) / counts.sum(axis=-1)
  return confidence.bootstrap(ratio, np.bincount(index, weights=values), np.bincount(index))


def scored_judge(score: Callable[[Sequence[str], Sequence[str]], np.ndarray]) -> Judge:
  """Returns the judge who prefers the higher score of (prompts, responses); equal ones are ties."""

  def judge(pairs):
    first, second = (
      np.asarray(score([pair.prompt for pair in pairs], responses), np.float64)
      for responses in zip(*((pair[1], pair[2]) for pair in pairs))
    )
    return [
      "A" if a > b else "B" if b > a else "tie" if a == b else "unparseable" for a, b in zip(first, second)
    ]

  return judge


def paired_judge(function: Callable[[str, str, str], str]) -> Judge:
  """Returns the judge of a function of (prompt, A, B) that says 'A', 'B' or 'tie'."""

  def one(pair):
    verdict = function(*pair)
    return verdict if verdict in ("A", "B", "tie") else "unparseable"

  return lambda pairs: [one(pair) for pair in pairs]


def ask_about(question: str, pair: Pair) -> str:
  """Returns the question with the pair in it; braces in its texts stay as they are."""
  texts = {"{prompt}": pair.prompt.strip(), "{a}": pair.ours.strip(), "{b}": pair.theirs.strip()}
  # In one pass: a response that holds "{b}" must not have the other put into it.
  return re.sub(r"\{(?:prompt|a|b)\}", lambda found: texts[found[0]], question)


def read_verdict(answer: str) -> str:
  """Returns what an answer says: 'A', 'B', 'tie' or 'unparseable'.

  The last "Preferred: A", "More helpful: B" or the like that ends a line counts, quoted or emphasised
  or not; without one, a last line that is the letter alone.
  """
  lines = [re.sub(r"[*_`\"'“”<>\[\]().]", "", line).strip() for line in answer.strip().splitlines()]
  # The last one: models weigh both before they decide, and name both on the way.
  said = [
    found[1]
    for line in lines
    for found in re.finditer(r"(?i:preferred|more helpful|choice|answer|verdict)\s*:\s*(.*)", line)
  ]
  if not said:
    said = [line for line in lines[-1:] if len(line) < 20]
  text = said[-1].strip() if said else ""
  if found := re.fullmatch(r"(?:(?i:response|summary)\s+)?([AB])", text):
    return found[1]
  # What is said and is no choice counts half, and is not left out.
  if re.fullmatch(r"(?i)(?:a )?tie|both|neither|equal(?:ly helpful)?|A (?:and|or) B|A/B", text):
    return "tie"
  return "unparseable"


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """A server of the OpenAI chat completions API, and how it is asked.

  Attributes:
    url: up to and with the version, such as https://api.openai.com/v1.
    model: its name there.
    question: with {prompt}, {a} and {b}; see `QUESTIONS`.
    options: further keys of a request.
    api_key: sent as a bearer token if not empty; it is written nowhere, not even where a server
      says it back.
    workers: requests under way at once.
    attempts: how often a request is made that meets 429, a server's error or no answer at all.
    patience: seconds waited before the second attempt, doubled before each further one.
    timeout: seconds waited for an answer.
  """

  url: str
  model: str
  question: str
  options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"temperature": 0, "max_tokens": 256})
  api_key: str = dataclasses.field(default="", repr=False)
  workers: int = 8
  attempts: int = 6
  patience: float = 1.0
  timeout: float = 120.0

  def __post_init__(self):
    """Refuses a key where it would be written.

    Raises:
      JudgeError: one is in the URL or among the options, or it cannot be sent.
    """
    try:
      parts = urllib.parse.urlsplit(self.url)
    except ValueError:
      raise JudgeError("--judge is no URL; give one such as https://api.openai.com/v1") from None
    if parts.scheme not in ("http", "https") or not parts.netloc:
      raise JudgeError(f"--judge is a URL of {parts.scheme!r}; give one such as https://api.openai.com/v1")
    if "@" in self.url or parts.query or parts.fragment or self.hide(self.url) != self.url:
      raise JudgeError(
        "--judge is a URL with a user, a query, a fragment or the API key, which would be written with the "
        "results; give it without, and the key in the environment (--api_key_env)"
      )
    for name in self.options:
      if re.search(r"(?i)api.?key|authorization|bearer|secret|password|access.?token", name):
        raise JudgeError(
          f"--judge_options has {name[:40]!r}, which would be kept with the answers; a key goes into the "
          "environment (--api_key_env)"
        )
    if self.hide(json.dumps(self.options)) != json.dumps(self.options):
      raise JudgeError("--judge_options holds the API key, which would be kept with the answers; take it out")
    if not re.fullmatch(r"[!-~]*", self.api_key):
      raise JudgeError(
        "the API key has a space, a line break or a letter that is not ASCII, and cannot be sent; set the "
        "environment variable (--api_key_env) to the key alone"
      )

  def hide(self, text: str) -> str:
    """Returns a text with *** in place of the API key, as it is or escaped."""
    for form in (self.api_key, urllib.parse.quote(self.api_key, safe=""), json.dumps(self.api_key)[1:-1]):
      text = text.replace(form, "***") if form else text
    return text

  def request(self, pair: Pair) -> dict[str, Any]:
    """Returns the body that asks about a pair."""
    message = {"role": "user", "content": ask_about(self.question, pair)}
    return {"model": self.model, "messages": [message], **self.options}


class Answers:
  """Answers by the request they are to, kept in a JSON lines file as they come."""

  def __init__(self, path: str | os.PathLike):
    """Reads what is there; a last line that was cut off is left out.

    Raises:
      JudgeError: the file is no file of answers.
      InUseError: another process keeps answers there.
      DiskError: it cannot be written.
    """
    self.path = paths.of(path)
    self._lock, self._known = threading.Lock(), {}
    with contextlib.ExitStack() as held:
      held.enter_context(owned(self.path, f"the file of answers {self.path}"))
      self._open()
      self._held = held.pop_all()

  def _open(self) -> None:
    damaged = []
    with disk_errors(self.path.parent):
      paths.make_folder(self.path.parent)
      text = appending.read(self.path, errors="replace") if appending.exists(self.path) else ""
    # A last line without an end was cut off by a kill.
    whole = text[: text.rfind("\n") + 1]
    for number, line in enumerate(whole.split("\n")[:-1], 1):
      try:
        entry = json.loads(line)
        answer = entry["answer"], entry["refused"]
        if entry.get("digest") in (None, _digest(entry["key"], *answer)):  # None: of an earlier version
          self._known[entry["key"]] = answer
          continue
        error = "its digest is another"
      except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        error = problem
      damaged.append(f"{self.path} line {number} is no answer of a judge ({str(error)[:200]})")
    if damaged and not self._known:
      raise JudgeError(f"{damaged[0]}; give another --answers")
    for problem in damaged:
      print(f"{problem}: it is asked for again", file=sys.stderr)
    with disk_errors(self.path.parent):
      self._file = appending.Appended(self.path, whole if whole != text else None)

  def __len__(self) -> int:
    return len(self._known)

  def get(self, key: str) -> tuple[str, bool] | None:
    """Returns the answer to a request and whether it was a refusal, or None."""
    return self._known.get(key)

  def add(self, key: str, request: dict, answer: str, refused: bool) -> None:
    """Keeps an answer.

    Raises:
      DiskError: the disk is full.
    """
    line = json.dumps(
      {
        "key": key,
        "request": request,
        "answer": answer,
        "refused": refused,
        "digest": _digest(key, answer, refused),
      }
    )
    with self._lock, disk_errors(self.path.parent):
      self._file.write(line + "\n")
      self._known[key] = answer, refused

  def close(self) -> None:
    self._file.close()
    self._held.close()


def endpoint_judge(endpoint: Endpoint, answers: Answers) -> Judge:
  """Returns the judge who asks a server what is not answered yet, each distinct request once."""

  def judge(pairs):
    bodies = [endpoint.request(pair) for pair in pairs]
    keys = [_key(endpoint.url, body) for body in bodies]
    missing = {key: body for key, body in zip(keys, bodies) if answers.get(key) is None}
    bar = tqdm.tqdm(
      total=len(pairs),
      initial=len(pairs) - len(missing),
      unit="pair",
      file=sys.stderr,
      disable=not sys.stderr.isatty(),
    )
    stop = threading.Event()
    with bar, concurrent.futures.ThreadPoolExecutor(endpoint.workers) as pool:
      asked = [pool.submit(_ask, endpoint, answers, stop, key, body) for key, body in missing.items()]
      try:
        for future in concurrent.futures.as_completed(asked):
          future.result()
          bar.update()
      # Answers that come in meanwhile are kept; what has not been asked yet is not asked.
      except BaseException as error:
        stop.set()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, JudgeError):
          raise JudgeError(f"{error} ({len(answers)} answers are kept in {answers.path})") from error
        raise
    return ["refused" if refused else read_verdict(answer) for answer, refused in map(answers.get, keys)]

  return judge


def _digest(key: str, answer: str, refused: bool) -> str:
  return digests.of_bytes(json.dumps([key, answer, refused]).encode())


def _key(url: str, body: dict) -> str:
  return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()


def _ask(endpoint: Endpoint, answers: Answers, stop: threading.Event, key: str, body: dict) -> None:
  url = f"{endpoint.url.rstrip('/')}/chat/completions"
  headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
  for attempt in range(endpoint.attempts):
    # Spread, so that many workers that were turned away do not come again together.
    wait = endpoint.patience * 2**attempt * random.uniform(0.75, 1.25)
    try:
      response = requests.post(
        url, json=body, headers=headers, timeout=endpoint.timeout, allow_redirects=False
      )  # no key is sent where nobody has said it may be
    except (requests.ConnectionError, requests.Timeout) as error:
      problem = f"gives no answer ({endpoint.hide(str(error))})"
    except requests.RequestException as error:
      raise JudgeError(f"{url} cannot be asked ({endpoint.hide(str(error))}); check --judge") from None
    else:
      if response.ok and not response.is_redirect:
        answer, refused = _content(endpoint, response)
        answers.add(key, body, endpoint.hide(answer), refused)
        return
      problem = f"answers {response.status_code} ({endpoint.hide(_said(response))[:200]})"
      if response.status_code != 429 and response.status_code < 500:
        hint = (
          "check the API key"
          if response.status_code in (401, 403)
          else "check --judge, --judge_model and --judge_options"
        )
        raise JudgeError(f"{url} {problem}; {hint}")
      # A server that says how long knows better.
      wait = max(wait, _asked_to_wait(response))
    if attempt + 1 < endpoint.attempts and stop.wait(wait):
      return
  raise JudgeError(f"{url} {problem}, {endpoint.attempts} times; start the same command again to go on")


def _content(endpoint: Endpoint, response: requests.Response) -> tuple[str, bool]:
  """Returns the text of an answer and whether it is a refusal."""
  try:
    choice = response.json()["choices"][0]
    message = choice["message"]
    refused = bool(message.get("refusal")) or choice.get("finish_reason") == "content_filter"
    return str(message.get("refusal") or message.get("content") or ""), refused
  except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
    raise JudgeError(
      f"{endpoint.url} answers in another form than chat completions do "
      f"({endpoint.hide(response.text)[:200]!r}); check --judge"
    ) from error


def _said(response: requests.Response) -> str:
  """The server's own words about an error."""
  try:
    return str(response.json()["error"]["message"])
  except (ValueError, KeyError, TypeError):
    return response.text.strip() or response.reason


def _asked_to_wait(response: requests.Response) -> float:
  try:
    return min(float(response.headers.get("Retry-After", 0)), 120.0)
  except ValueError:  # a date
    return 0.0
