"""TRL's DPOTrainer on the benchmark's pairs: python -m experiments.benchmark.trl_side SETTINGS OUT."""

import json
import sys
import tempfile
import time

import datasets
import peft
import torch
import transformers
import trl

from experiments.benchmark import measure


class Clock(transformers.TrainerCallback):
  """Seconds from the start of each optimizer step to its end."""

  def __init__(self):
    self.seconds = []

  def on_step_begin(self, *_, **__):
    self._start = measure.now()

  def on_step_end(self, *_, **__):
    self.seconds.append(measure.now() - self._start)


class Trainer(trl.DPOTrainer):
  """Keeps what every step was, before it is averaged and rounded for the log."""

  def __init__(self, *args, **options):
    self.trace = []
    super().__init__(*args, **options)

  def compute_loss(self, *args, **options):
    loss = super().compute_loss(*args, **options)
    kept = {name: values[-1] for name, values in self._metrics["train"].items() if values}
    self.trace.append({"loss": float(loss.detach())} | kept)
    return loss


def check_ids(settings: dict, dataset) -> None:
  """Ends the run where TRL reads other ids than dpojax does: nothing could be compared."""
  with open(settings["ids"]) as lines:
    for number, (line, theirs) in enumerate(zip(lines, dataset)):
      found = [theirs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
      if json.loads(line) != found:
        sys.exit(f"pair {number} has other ids: {line.strip()} beside {found}")


def run(settings: dict) -> dict:
  on_gpu = torch.cuda.is_available()
  if not on_gpu:
    torch.set_num_threads(settings["threads"])
  torch.manual_seed(0)
  dtype = torch.bfloat16 if settings["dtype"] == "bfloat16" else torch.float32
  model = transformers.AutoModelForCausalLM.from_pretrained(
    settings["model"], dtype=dtype, attn_implementation=settings.get("attention", "sdpa")
  )
  if settings.get("adapter"):
    model = peft.PeftModel.from_pretrained(model, settings["adapter"], is_trainable=True)
  tokenizer = transformers.AutoTokenizer.from_pretrained(settings["tokenizer"])
  tokenizer.pad_token = tokenizer.eos_token
  with open(settings["pairs"]) as lines:
    pairs = datasets.Dataset.from_list([json.loads(line) for line in lines])
  clock = Clock()
  with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
      model=model,
      processing_class=tokenizer,
      train_dataset=pairs,
      callbacks=[clock],
      args=trl.DPOConfig(
        output_dir=folder,
        beta=settings["beta"],
        learning_rate=settings["learning_rate"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["micro"],
        gradient_accumulation_steps=settings["batch_size"] // settings["micro"],
        max_length=settings["max_length"],
        lr_scheduler_type="constant",
        max_grad_norm=10.0,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        weight_decay=0.0,
        bf16=settings["dtype"] == "bfloat16",
        gradient_checkpointing=settings.get("remat", "none") != "none",
        precompute_ref_log_probs=settings.get("stored", False),
        use_cpu=not on_gpu,
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        use_liger_kernel=settings.get("liger", False),
      ),
    )
    if settings.get("check_ids"):
      check_ids(settings, trainer.train_dataset)
    start = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - start
  losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
  return {
    "trace": trainer.trace,
    "seconds": clock.seconds,
    "whole": whole,
    "losses": losses,
    "peak_bytes": measure.peak_bytes(torch if on_gpu else None),
    "versions": {
      "trl": trl.__version__,
      "torch": torch.__version__,
      "transformers": transformers.__version__,
    },
  }


if __name__ == "__main__":
  with open(sys.argv[1]) as given, open(sys.argv[2], "w") as out:
    json.dump(run(json.load(given)), out)
