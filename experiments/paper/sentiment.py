"""Controlled sentiment on real text (the paper's Section 6.1), small enough for two CPU cores.

Film-review sentences are read from a file of {"text", "label"} lines. A language model and a byte-pair
tokenizer are trained on most of them; so is the true reward, a classifier of words and word pairs
(Wang and Manning 2012), whose accuracy on held-out sentences is reported. Then as the paper does:
prefixes of 2 to 8 tokens, four completions of each sampled from the model, all six pairs labelled by
the true reward. What the paper leaves open and is chosen here: a prefix ends where a word does; samples
are drawn at temperature 1 and have at most `max_new_tokens` tokens; pairs whose rewards are equal are
left out; prefixes of held-out sentences measure.
"""

import gzip
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import transformers

from configs import dpo, sft
from dpojax import train
from dpojax.data import loader, tokenization
from dpojax.data.examples import DataError
from dpojax.runtime.disk import disk_errors
from dpojax.training import resolve, weights
from experiments.measurements import measure
from experiments.paper import methods

LONGEST_PREFIX = 8
CLEAR = 0.3


class Sizes(NamedTuple):
  """How large the world is."""

  vocabulary: int = 2000
  width: int = 64
  layers: int = 2
  sft_steps: int = 1000
  prefixes: int = 8000
  held_out_pairs: int = 1200
  held_out: int = 256
  samples: int = 4
  max_new_tokens: int = 32
  dpo_steps: int = 400
  batch_size: int = 64


class Sentences(NamedTuple):
  """Sentences and whether each is positive, [n] bool."""

  texts: list[str]
  positive: np.ndarray


class Classifier(NamedTuple):
  """The true reward: weights of words and word pairs, and the accuracy on held-out sentences."""

  weights: dict[str, float]
  bias: float
  accuracy: float

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Returns p(positive | text), [n] float64."""
    logits = [self.bias + sum(self.weights.get(term, 0.0) for term in terms_of(text)) for text in texts]
    return 1 / (1 + np.exp(-np.array(logits, np.float64)))


class Asked(NamedTuple):
  """Texts, and their prefixes as ids [n, W] padded on the right, of [n] tokens."""

  texts: list[str]
  prompts: np.ndarray
  lengths: np.ndarray


class Made(NamedTuple):
  """The world, and what figures need besides.

  Attributes:
    world: the world.
    bench: what samples and measures.
    held_out: sentences that nobody trained on.
    classifier: the true reward.
    compared: (config, prompts, lengths, answers) -> the comparisons of those answers.
  """

  world: methods.World
  bench: measure.Bench
  held_out: Asked
  classifier: Classifier
  compared: Callable[..., resolve.Data]


def read_sentences(path: str | pathlib.Path) -> Sentences:
  """Reads lines of {"text", "label"}, gzipped or not, in a shuffled order that is always the same.

  Raises:
    DataError: the file is not there, or a line has no text or label.
  """
  path = pathlib.Path(path).expanduser()
  try:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
      lines = [json.loads(line) for line in file]
    texts, labels = [line["text"].strip() for line in lines], [bool(line["label"]) for line in lines]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise DataError(
      f"sentences {path} cannot be read ({error!r}); give a file whose lines are "
      '{"text": ..., "label": 0 or 1}'
    ) from error
  order = np.random.default_rng(0).permutation(len(texts))
  return Sentences([texts[i] for i in order], np.array(labels)[order])


def terms_of(text: str) -> set[str]:
  """Returns the words and the pairs of neighbouring words of a text."""
  words = text.split()
  return {*words, *(f"{a} {b}" for a, b in zip(words, words[1:]))}


def fit_classifier(train_on: Sentences, held_out: Sentences) -> Classifier:
  """Fits logistic regression to terms, each scaled by its log-count ratio (Wang and Manning 2012)."""
  terms = [terms_of(text) for text in train_on.texts]
  counts = {}
  for each, positive in zip(terms, train_on.positive):
    for term in each:
      counts.setdefault(term, [1.0, 1.0])[int(positive)] += 1
  known = {
    term: i for i, term in enumerate(sorted(term for term, (a, b) in counts.items() if a + b >= 4))
  }  # seen twice
  count = np.array([counts[term] for term in known])
  ratio = np.log(count[:, 1] / count[:, 1].sum()) - np.log(count[:, 0] / count[:, 0].sum())
  document, term = (
    np.array(each)
    for each in zip(*((i, known[each]) for i, of in enumerate(terms) for each in sorted(of) if each in known))
  )
  scale, positive = jnp.asarray(ratio, jnp.float32), jnp.asarray(train_on.positive)

  def loss(params):
    weights, bias = params
    logits = bias + jax.ops.segment_sum((weights * scale)[term], document, num_segments=len(terms))
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, positive)) + 1e-4 * jnp.sum(weights**2)

  fitted, bias = _minimise(loss, (jnp.zeros(len(known)), jnp.zeros(())), steps=100)
  weights = dict(zip(known, np.asarray(fitted * scale, np.float64).tolist()))
  classifier = Classifier(weights, float(bias), 0.0)
  right = (classifier(held_out.texts) > 0.5) == held_out.positive
  return classifier._replace(accuracy=float(right.mean()))


def _minimise(loss, params, *, steps: int):
  """Returns params after steps of L-BFGS."""
  tx = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss)

  @jax.jit
  def step(params, state):
    value, grad = value_and_grad(params, state=state)
    updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return params


def make(
  folder: pathlib.Path, sentences_path: str, sizes: Sizes = Sizes(), *, labels: str = "argmax"
) -> Made:
  """Returns the world, made in the folder at the first call.

  Args:
    folder: where everything is kept.
    sentences_path: see `read_sentences`.
    sizes: how large everything is.
    labels: 'argmax', the better one is chosen, as in the paper; 'bradley_terry', drawn with the
      difference of the classifier's logits; 'clear', as in the paper, but pairs whose rewards differ by
      less than `CLEAR` are left out.

  Raises:
    DataError: the sentences cannot be read, or are too few.
    ValueError: labels are none of these.
  """
  if labels not in ("argmax", "bradley_terry", "clear"):
    raise ValueError(f"labels is {labels!r}; it must be 'argmax', 'bradley_terry' or 'clear'")
  sentences = read_sentences(sentences_path)
  cut = len(sentences.texts) * 4 // 5
  if len(sentences.texts) - cut < sizes.held_out or cut < sizes.prefixes:
    raise DataError(
      f"{sentences_path} has {len(sentences.texts)} sentences; too few for "
      f"{sizes.prefixes} prefixes of four fifths and {sizes.held_out} of the rest"
    )
  learnt = Sentences(sentences.texts[:cut], sentences.positive[:cut])
  others = Sentences(sentences.texts[cut:], sentences.positive[cut:])
  with disk_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer" / "tokenizer.json").exists():
      save_tokenizer(folder / "tokenizer", learnt.texts, sizes.vocabulary)
    if not (folder / "classifier.json").exists():
      (folder / "classifier.json").write_text(json.dumps(fit_classifier(learnt, others)))
  classifier = Classifier(*json.loads((folder / "classifier.json").read_text()))
  tokenizer = tokenization.load_tokenizer(str(folder / "tokenizer"))
  rng = np.random.default_rng(1)
  starts, rests = zip(*(split(tokenizer, text, rng) for text in learnt.texts))
  held_out = asked(tokenizer, others.texts[: sizes.held_out], rng)
  model = _language_model(folder, sizes, starts, rests)

  bench = measure.Bench(
    model.config,
    measure.reward_of_text(tokenizer, classifier),
    stop_id=tokenizer.eos_token_id,
    num_samples=sizes.samples,
    max_new_tokens=sizes.max_new_tokens,
    prompts_at_once=sizes.held_out,
  )
  prompts, lengths = measure.prompt_ids(tokenizer, starts[: sizes.prefixes], LONGEST_PREFIX)
  answers = _completions(folder, bench, model, prompts, lengths)
  reference = jax.device_put(model.params)
  compared = lambda config, *asked_and_answers: _data(config, sizes, *asked_and_answers, labels)
  world = methods.World(
    folder=folder,
    model=model,
    config=_config(folder, sizes),
    prompts=prompts,
    prompt_lengths=lengths,
    reward=bench.reward,
    stop_id=tokenizer.eos_token_id,
    max_new_tokens=sizes.max_new_tokens,
    measure=lambda params, seed: bench.measure(
      params, reference, held_out.prompts, held_out.lengths, seed=seed
    ),
    data=lambda config: compared(config, prompts, lengths, answers),
  )
  return Made(world, bench, held_out, classifier, compared)


def asked(tokenizer, texts: Sequence[str], rng: np.random.Generator) -> Asked:
  """Returns texts and a prefix of each, see `split`."""
  starts = [split(tokenizer, text, rng)[0] for text in texts]
  return Asked(list(texts), *measure.prompt_ids(tokenizer, starts, LONGEST_PREFIX))


def save_tokenizer(folder: pathlib.Path, texts: Sequence[str], vocabulary: int) -> None:
  """Trains a byte-level byte-pair tokenizer and saves it as a Hugging Face folder."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator(
    texts,
    tokenizers.trainers.BpeTrainer(
      vocab_size=vocabulary,
      special_tokens=["<eos>"],
      show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def split(tokenizer, text: str, rng: np.random.Generator) -> tuple[str, str]:
  """Cuts a sentence after 2 to 8 tokens, where a word ends: prefix and rest, " " in front of it."""
  words = text.split()
  tokens = [
    len(ids)
    for ids in tokenizer([" ".join(words[:n]) for n in range(1, min(len(words), LONGEST_PREFIX) + 1)])[
      "input_ids"
    ]
  ]
  places = [n for n, count in enumerate(tokens, 1) if 2 <= count <= LONGEST_PREFIX]
  n = int(rng.choice(places)) if places else 1
  return " ".join(words[:n]), "".join(f" {word}" for word in words[n:])


def _language_model(
  folder: pathlib.Path, sizes: Sizes, starts: Sequence[str], rests: Sequence[str]
) -> weights.Loaded:
  """Trains the reference on the sentences, or reads it."""
  path = folder / "sentences.jsonl"
  with disk_errors(folder):
    path.write_text(
      "".join(
        json.dumps({"prompt": start, "responses": [rest]}) + "\n"
        for start, rest in zip(starts, rests)
        if rest
      )
    )
  config = _shared(sft.get_config(), folder, sizes)
  config.loss = "token_mean"
  config.data.path = str(path)
  config.data.unique_prompts = False
  config.data.cache_dir = str(folder / "prepared")
  config.data.max_length = 96
  config.model.width, config.model.layers, config.model.heads = sizes.width, sizes.layers, 2
  config.model.scan_layers = False
  config.steps = sizes.sft_steps
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
  config.eval_every = config.log_every = config.checkpoint_every = sizes.sft_steps // 10
  train.run(config, folder / "sft")
  return weights.load(str(folder / "sft"))


def _shared(config, folder: pathlib.Path, sizes: Sizes):
  """What the language model's run and all others have in common."""
  config.tokenizer = str(folder / "tokenizer")
  config.data.max_prompt_length = LONGEST_PREFIX
  config.row_length = 128
  config.batch_size = sizes.batch_size
  config.optimizer.name = "adamw"
  config.optimizer.max_grad_norm = 1.0
  return config


def _config(folder: pathlib.Path, sizes: Sizes):
  """What the runs that start from the reference have in common."""
  config = _shared(dpo.get_config(), folder, sizes)
  config.model.checkpoint = str(folder / "sft")
  config.data.path = "sampled, not read"
  config.data.max_length = LONGEST_PREFIX + sizes.max_new_tokens
  config.reference.mode = "stored"
  config.data.cache_dir = str(folder / "prepared")
  config.steps = sizes.dpo_steps
  config.optimizer.learning_rate = 3e-4
  config.optimizer.warmup_steps = 20
  config.log_every = 20
  config.eval_every = config.checkpoint_every = 100
  return config


def _completions(
  folder: pathlib.Path, bench: measure.Bench, model: weights.Loaded, prompts: np.ndarray, lengths: np.ndarray
) -> measure.Answers:
  """Returns completions of the prefixes by the reference, sampled once."""
  path = folder / "completions.npz"
  if not path.exists():
    answers = bench.answers(model.params, prompts, lengths, seed=1)
    with disk_errors(folder):
      np.savez(folder / "unfinished.npz", **answers._asdict())
      (folder / "unfinished.npz").replace(path)
  with np.load(path) as arrays:
    return measure.Answers(**arrays)


def _data(config, sizes: Sizes, prompts, lengths, answers: measure.Answers, labels: str) -> resolve.Data:
  """Returns every pair of completions of a prefix; of a tenth of the prefixes they are held out.

  For SFT the chosen of each pair, so that the better a completion the more often it stands there.
  """
  rng = np.random.default_rng([config.seed, 3])
  rewards = answers.rewards
  sure = np.clip(rewards, 1e-9, 1 - 1e-9)
  logits = np.log(sure) - np.log1p(-sure)
  train, held_out = [], []
  for i, (prompt, length) in enumerate(zip(prompts, lengths)):
    ids = [tokens[:n] for tokens, n in zip(answers.tokens[i], answers.lengths[i])]
    for a, b in itertools.combinations(range(len(ids)), 2):
      apart = abs(rewards[i, a] - rewards[i, b])
      if apart == 0 or (labels == "clear" and apart < CLEAR):
        continue
      first = rewards[i, a] > rewards[i, b]
      if labels == "bradley_terry":
        first = rng.random() < 1 / (1 + np.exp(logits[i, b] - logits[i, a]))
      better, worse = (ids[a], ids[b]) if first else (ids[b], ids[a])
      (held_out if i % 10 == 9 else train).append((prompt[:length], better, worse))
  kept = 2 if config.objective == "sft" else 3
  parts = train, held_out[: sizes.held_out_pairs]
  train, held_out = (loader.all_of(methods.in_ids(*list(zip(*part))[:kept])) for part in parts)
  if config.data.shuffle_labels:
    train = loader.shuffle_labels(train, config.seed)
  return resolve.Data(train, held_out, train.data.fingerprint)
