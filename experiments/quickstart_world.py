"""A small grammar of film reviews, and the rule that says how positive a review is.

The rule is the experiment's true reward: p(positive | text), the logistic function of the weights of
the words that carry sentiment. An adverb before such a word scales it, "not" turns it round, and what
follows "but" counts half as much again.
"""

import math

import numpy as np

POSITIVE = {
  "brilliant": 1.6,
  "wonderful": 1.5,
  "moving": 1.2,
  "clever": 1.0,
  "charming": 1.0,
  "funny": 0.9,
  "fresh": 0.7,
  "warm": 0.6,
  "decent": 0.3,
}
NEGATIVE = {
  "awful": -1.6,
  "dreadful": -1.5,
  "tedious": -1.2,
  "clumsy": -1.0,
  "dull": -1.0,
  "hollow": -0.9,
  "flat": -0.7,
  "cold": -0.6,
  "uneven": -0.3,
}
VERBS = {"loved": 1.5, "enjoyed": 1.0, "liked": 0.6, "hated": -1.5, "disliked": -0.8, "endured": -0.7}
ADVERBS = {"truly": 1.4, "very": 1.3, "quite": 0.8, "rather": 0.6, "hardly": -0.5, "not": -0.7}
NOUNS = (
  "film story plot script ending dialogue pacing acting cast hero villain music score "
  "camera editing opening humour romance"
).split()
PLACES = "in the first half|from start to finish|on a second viewing|in every scene".split("|")
END = "."

WEIGHTS = POSITIVE | NEGATIVE | VERBS


def vocabulary() -> list[str]:
  """Returns every word of the grammar, sorted."""
  words = set(WEIGHTS) | set(ADVERBS) | set(NOUNS) | {"the", "is", "was", "i", "but", "and", END}
  return sorted(words | {word for place in PLACES for word in place.split()})


def review(rng: np.random.Generator) -> str:
  """Returns one review: two or three clauses, kinder or unkinder by a mood drawn for it."""
  mood = 1 / (1 + math.exp(-rng.normal(scale=1.2)))

  def sentiment(kind, unkind):
    return rng.choice(list(kind if rng.random() < mood else unkind))

  def clause():
    noun = rng.choice(NOUNS)
    if rng.random() < 0.25:
      verb = sentiment([v for v in VERBS if VERBS[v] > 0], [v for v in VERBS if VERBS[v] < 0])
      words = f"i {verb} the {noun}"
    else:
      adverb = f"{rng.choice(list(ADVERBS))} " if rng.random() < 0.4 else ""
      words = f"the {noun} {rng.choice(['is', 'was'])} {adverb}{sentiment(POSITIVE, NEGATIVE)}"
    return words + (f" {rng.choice(PLACES)}" if rng.random() < 0.15 else "")

  text = clause()
  for _ in range(rng.integers(1, 3)):
    text += f" {rng.choice(['and', 'but'])} {clause()}"
  return f"{text} {END}"


def true_reward(text: str) -> float:
  """Returns p(positive | text), in (0, 1), by the rule above."""
  total, scale, emphasis = 0.0, 1.0, 1.0
  for word in text.split():
    if word in WEIGHTS:
      total += WEIGHTS[word] * scale * emphasis
      scale = 1.0
    elif word in ADVERBS:
      scale *= ADVERBS[word]
    elif word == "but":
      scale, emphasis = 1.0, 1.5
    else:
      scale = 1.0
  return 1 / (1 + math.exp(-total))


def prefix(text: str, rng: np.random.Generator) -> str:
  """Returns the first 2 to 8 words of a review, at most all but two."""
  words = text.split()
  return " ".join(words[: rng.integers(2, min(8, len(words) - 2) + 1)])
